"""Sizes, memory and time of a run, from the configuration alone."""
