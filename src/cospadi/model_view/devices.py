"""Where tensors live: moving nested arguments, placing a model for a while, running out of memory politely."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import ResourceError


def move(value: Any, device: torch.device | str) -> Any:
    """Move every tensor in nested tuples, lists and dicts; whatever else stands there stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(move(item, device) for item in value)
    if type(value) is dict:
        return {key: move(item, device) for key, item in value.items()}
    return value


@contextmanager
def placed(
    module: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    without: Iterable[nn.Module] = (),
) -> Iterator[nn.Module]:
    """Lend a module to another device and float type; afterwards its own tensors are back, bit by bit.

    Unlike ``.to(…)`` and back, nothing is copied on the way home and float32 buffers (rotary frequencies) never pass
    through a shorter type. What is written to the weights meanwhile is lost.

    Args:
        module: any module.
        device: where it shall run.
        dtype: for parameters and buffers of a shorter float type; None leaves them.
        without: parts that stay where they are.
    """
    originals: dict[int, tuple[Tensor, Tensor]] = {}
    staying = {id(tensor) for part in without for tensor in (*part.parameters(), *part.buffers())}
    try:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in staying:
                continue
            originals[id(tensor)] = (tensor, tensor.data)
            widen = dtype if dtype and tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize else None
            tensor.data = tensor.data.to(device, widen or tensor.dtype)
        yield module
    finally:
        for tensor, data in originals.values():
            tensor.data = data


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
