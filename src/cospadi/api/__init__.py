"""The functions behind ``from cospadi import …``: what the commands do, under the same names, with progress and pages.

Each takes the options of its command. The command line calls these functions, so both do the same.
"""
