"""Write a directory so that it never looks finished before it is."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cospadi.checkpoint.headers import INDEX, SINGLE
from cospadi.errors import OutputError

CONFIG = "config.json"
_STAGING = ".unfinished"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Provide a fresh subdirectory of `out` whose files move to `out` when the block succeeds, ``config.json`` last.

    While they move there is no ``config.json``, so no reader mistakes a mixture of old and new files for one
    checkpoint. Weight files of an earlier checkpoint that the new one does not overwrite are removed. If the block
    fails, `out` keeps what it had.

    Args:
        out: the directory; created if absent.

    Yields:
        where to write.

    Raises:
        OutputError: if anything cannot be written.
    """
    staging = out / _STAGING
    try:
        try:
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir(parents=True)
            yield staging
            _publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(_explain(error, out)) from error


def _publish(staging: Path, out: Path) -> None:
    new = sorted(path.name for path in staging.iterdir())
    mode = (staging / CONFIG).stat().st_mode  # what the user's umask allows; safetensors writes for the owner only
    for name in new:
        (staging / name).chmod(mode)
        _flush(staging / name)
    (out / CONFIG).unlink(missing_ok=True)
    for old in out.iterdir():
        if (_WEIGHTS.fullmatch(old.name) or old.name == INDEX) and old.name not in new:
            old.unlink()
    for name in sorted(new, key=lambda name: name == CONFIG):
        os.replace(staging / name, out / name)  # noqa: PTH105
    _flush(out)


def _flush(path: Path) -> None:
    """Flush a file or directory to disk: a power cut must not leave a config beside empty weights."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: Exception, out: Path) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # safetensors has the number only in its text
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{out}: no space left for the checkpoint, nothing was written: free space or choose another directory"
    reason = os.strerror(number) if number else str(error)
    return f"{out}: the checkpoint cannot be written: {reason}; check the directory or choose another"


__all__ = ["CONFIG", "INDEX", "SINGLE", "staged"]
