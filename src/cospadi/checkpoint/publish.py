"""Write a directory so that it never looks finished before it is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cospadi.checkpoint.headers import INDEX, SINGLE
from cospadi.io import disk_errors, flush

CONFIG = "config.json"
_STAGING = ".unfinished"
_WHEN_FULL = "free some space or choose another directory; nothing of the checkpoint was kept"
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
    with disk_errors(out, _WHEN_FULL):
        try:
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir(parents=True)
            yield staging
            _publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    new = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    mode = (staging / CONFIG).stat().st_mode  # what the user's umask allows; safetensors writes for the owner only
    for name in new:
        (staging / name).chmod(mode)
        flush(staging / name)
    (out / CONFIG).unlink(missing_ok=True)
    for old in out.iterdir():
        if (_WEIGHTS.fullmatch(old.name) or old.name == INDEX) and old.name not in new:
            old.unlink()
    for name in sorted(new, key=lambda name: name == CONFIG):
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, out / name)  # noqa: PTH105
    flush(out)


__all__ = ["CONFIG", "INDEX", "SINGLE", "staged"]
