"""``SHA256SUMS``: detects an altered weight file whose shapes, masks and scales still look right."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cospadi.errors import CheckpointError

CHECKSUMS = "SHA256SUMS"
_REMEDY = f"copy the checkpoint again, or delete {CHECKSUMS} if you changed the file yourself"


def write_checksums(directory: Path) -> None:
    """Write the hash of every weight file, in the format of ``sha256sum -c``.

    Args:
        directory: of a finished checkpoint.
    """
    files = sorted(directory.glob("*.safetensors"))
    lines = [f"{_digest(path)}  {path.name}\n" for path in files]
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def has_checksums(directory: Path) -> bool:
    """Whether a directory has a ``SHA256SUMS`` of weight files alone, as ours are; others may list anything."""
    try:
        lines = (directory / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return bool(lines) and all(line.endswith(".safetensors") for line in lines)


def check_checksums(directory: Path) -> None:
    """Compare the weight files with their hashes; a directory without ``SHA256SUMS`` passes.

    Raises:
        CheckpointError: naming the file that differs.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        digest, _, name = line.partition("  ")
        file = directory / name
        if len(digest) != 64 or not name or Path(name).name != name:
            raise CheckpointError(f"{path}, line {number}: not a hash and a file name; {_REMEDY}")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though {CHECKSUMS} lists it; {_REMEDY}")
        if _digest(file) != digest:
            raise CheckpointError(f"{file}: its content is not what was written; {_REMEDY}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
