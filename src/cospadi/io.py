"""Writing to disk: files that are complete or absent, and errors that name the cause and the remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cospadi.errors import OutputError

UNFINISHED = ".part"
"""Suffix of a file that is still being written."""
RESUMES = "free some space and run the same command again; it resumes where it stopped"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: str | os.PathLike[str], when_full: str = RESUMES) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into one clear line.

    Args:
        path: what is being written, for the message.
        when_full: the remedy for a full disk.

    Raises:
        OutputError: in place of an error of the operating system or of safetensors.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number in _FULL:
            raise OutputError(f"no space left on the disk of {os.fspath(path)}: {when_full}") from error
        reason = os.strerror(number) if number else str(error)
        raise OutputError(
            f"{os.fspath(path)} cannot be written: {reason}; check it or choose another directory"
        ) from error


def no_space(error: Exception) -> bool:
    """Whether an error of the operating system or of safetensors is a full disk or a file that may not grow."""
    return _error_number(error) in _FULL


def _error_number(error: Exception) -> int | None:
    """The errno of an error; safetensors mentions it only in its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as its user means it: a leading ``~`` is the home directory. All paths that users give go through here.

    Shells leave ``~`` alone within quotes and in ``--out=~/dir``, and programs that start commands do not expand it.

    Args:
        path: ``./~name`` is a path whose name begins with ``~``; it becomes absolute, and so may be expanded again.

    Raises:
        OutputError: if it begins with the name of a user who does not exist.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        found = Path(text)
        return Path.cwd() / found if str(found).startswith("~") else found
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise OutputError(
            f"{text}: there is no such home directory; for a name that begins with ~ write ./{text}"
        ) from None


def write_durably(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file that is either complete or absent, even after a power cut.

    The content goes to a file beside it, is flushed to disk, and is then renamed.

    Args:
        path: its directory is created if absent. An existing file is replaced.
        content: bytes, or text to be encoded as UTF-8 (lone surrogates become question marks).

    Returns:
        the path.

    Raises:
        OutputError: if it cannot be written.
    """
    target = Path(path)
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    temporary = target.with_name(target.name + UNFINISHED)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file or a directory to disk, so that it survives a power cut.

    Raises:
        OSError: if that fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
