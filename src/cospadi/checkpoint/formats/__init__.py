"""One file for each stored format; `base` holds what they share."""
