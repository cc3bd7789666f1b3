"""Peak memory, and running out of it politely."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from cospadi.errors import ResourceError


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: of the process, and on CUDA devices where used."""
    unit = 1 if sys.platform == "darwin" else 1024
    out = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        out["device"] = torch.cuda.max_memory_allocated()
    return out


def _exhausted(error: MemoryError | RuntimeError) -> Literal["GPU", "machine"] | None:
    """Whose memory ran out, if that is what the error says."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    # the CPU allocator has no exception class of its own
    signs = ("DefaultCPUAllocator", "can't allocate memory")
    out = isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
    return "machine" if out else None


@contextmanager
def memory_errors(remedy: str = "use fewer (--samples 64) or shorter sequences (--seq-len 512)") -> Iterator[None]:
    """Turn running out of memory, of a GPU or of the machine, into one line.

    Args:
        remedy: advice for the user, with flags that the running command accepts.

    Raises:
        ResourceError: in place of the out-of-memory error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        place = _exhausted(error)
        if place is None:
            raise
        if place == "GPU":
            raise ResourceError(f"out of memory on the GPU: {remedy}, or --device cpu") from None
        raise ResourceError(f"out of memory: {remedy}, or a machine with more memory") from None


@contextmanager
def guard_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory, of a GPU or of the machine, into one line.

    Args:
        doing: what was going on, for example ``"collecting statistics of layer 3"``.
        remedy: what to do about it.

    Raises:
        ResourceError: in place of the out-of-memory error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        place = _exhausted(error)
        if place is None:
            raise
        what = "GPU memory" if place == "GPU" else "memory"
        raise ResourceError(f"out of {what} while {doing}; {remedy}") from None
