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
def memory_errors() -> Iterator[None]:
    """Turn an out-of-memory error into one clear line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ResourceError(
            "out of memory on the GPU: try fewer sequences (--samples 64), shorter ones (--seq-len 512) or --device cpu"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise ResourceError(
            "out of memory: try fewer sequences (--samples 64), shorter ones (--seq-len 512), or a machine with more"
        ) from None


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
