"""Methods that remove whole decoder layers (blocks): one file a paper."""
