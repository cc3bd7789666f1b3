"""The checkpoint formats, one file each.

`base` says what a format is and holds the registry; `grouped` is the base of formats that store linear layers.
"""
