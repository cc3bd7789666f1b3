"""What identifies a run: versions, hashes of weights, seeds."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn


def versions() -> dict[str, str]:
    """Versions that a report names."""
    out = {"python": platform.python_version()}
    for package in ("cospadi", "torch", "transformers", "safetensors", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "?"
    return out


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
