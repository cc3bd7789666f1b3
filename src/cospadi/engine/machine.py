"""What a run needs to know of the machine: device, memory, versions."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from cospadi.errors import RecipeError, ResourceError
from cospadi.model_view import placed


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


def versions() -> dict[str, str]:
    """Versions that a report names."""
    out = {"python": platform.python_version()}
    for package in ("cospadi", "torch", "transformers", "safetensors", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "?"
    return out


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


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def weights_sha256(model: nn.Module) -> str:
    """Hash of all weights: names, dtypes, shapes, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def derived_seed(seed: int, name: str) -> int:
    """A seed for one group, independent of the order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:6], "little")
