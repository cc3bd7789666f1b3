"""ReplaceMe (arXiv 2505.02819): a linear transform replaces a run of blocks.

`branch` finds the layer that takes the transform, `rows` streams what it is fitted on into `normal_equations`,
`transform` solves for it, `trials` measures corrections on held-out text, and `method` is the pruning method.
"""
