"""Methods that remove a share of the width: one file a paper."""
