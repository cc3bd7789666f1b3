"""Peak memory, and running out of it politely."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cospadi.errors import ResourceError


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: of the process, and on CUDA devices where used."""
    unit = 1 if sys.platform == "darwin" else 1024
    out = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        out["device"] = torch.cuda.max_memory_allocated()
    return out


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
    except torch.OutOfMemoryError:
        raise ResourceError(f"out of memory on the GPU: {remedy}, or --device cpu") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
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
    except torch.OutOfMemoryError:
        raise ResourceError(f"out of GPU memory while {doing}; {remedy}") from None
    except MemoryError:
        raise ResourceError(f"out of memory while {doing}; {remedy}") from None
    except RuntimeError as error:  # the CPU allocator has no exception class of its own
        if "DefaultCPUAllocator" in str(error):
            raise ResourceError(f"out of memory while {doing}; {remedy}") from None
        raise
