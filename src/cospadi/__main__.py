"""``python -m cospadi``: the command line."""

from cospadi.cli import main

main()
