"""Devices by name, and models lent to another device or float type for a while."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cospadi.errors import RecipeError


def parse_device(name: str) -> torch.device:
    """The device of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, whether this machine has it or not.

    Raises:
        RecipeError: if it is none of these.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def resolve_device(name: str) -> torch.device:
    """The device of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        RecipeError: if there is no such device here.
    """
    device = parse_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def compute_dtype(weight_bytes: int, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in where it should not be the model's own: float32 on processors without bfloat16 units.

    Such a processor multiplies float32 matrices about twice as fast. None where the model's own dtype is better, or
    where the memory would not hold the wider weights.

    Args:
        weight_bytes: of the model as it is.
        device: where it runs.
    """
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return None
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.float32 if 3 * weight_bytes < available else None


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
def widened(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Lend a model the float type it is fastest in while its activations are read, see :func:`compute_dtype`.

    Args:
        model: on the host; afterwards its weights are as they were, bit by bit.
        device: where its layers will run.
    """
    dtype = compute_dtype(sum(p.numel() * p.element_size() for p in model.parameters()), device)
    with placed(model, "cpu", dtype) if dtype else nullcontext():
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same gradients in every run: of the attention kernels, only those whose backward pass adds up in order."""
    if device.type != "cuda":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
