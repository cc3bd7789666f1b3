"""Output directories. Imports no torch."""

from pathlib import Path

from cospadi.errors import OutputError


def check_new_directory(out: Path) -> None:
    """Refuse an output directory that is not empty: its files may not be ours to overwrite.

    Raises:
        OutputError: if it is a file, or not empty.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: pass a directory")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty: choose a new directory")
