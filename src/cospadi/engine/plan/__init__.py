"""The plan: which layers form a group, and how many bytes each group gets, from shapes alone."""
