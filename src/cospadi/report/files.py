"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path

from cospadi.errors import OutputError


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file under a temporary name and move it into place, so that nobody ever reads half of it.

    Args:
        path: its folder is created if necessary.
        content: bytes, or text, which is encoded as UTF-8.

    Raises:
        OutputError: if it cannot be written.
    """
    target = Path(path)
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror or type(error).__name__
        raise OutputError(f"cannot write {target}: {reason}; free some space or choose another folder") from error
    return target
