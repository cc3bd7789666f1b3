"""ReplaceMe (arXiv 2505.02819): a run of blocks replaced by one linear transform."""
