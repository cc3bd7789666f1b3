"""Models with shared attention matrices, trained from scratch."""
