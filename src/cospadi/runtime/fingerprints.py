"""What identifies a run: versions, hashes of weights, seeds."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).parents[3]
"""The checkout that this package runs from, if it is not installed elsewhere."""


def versions() -> dict[str, str]:
    """Versions that a report names; of this package also the commit, where it runs from a checkout."""
    out = {"python": platform.python_version(), "cospadi": own_version()}
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "?"
    found = commit()
    return out | ({"commit": found} if found else {})


def own_version() -> str:
    """This package's version, from its metadata or, where it is not installed, from the checkout."""
    try:
        return version("cospadi")
    except PackageNotFoundError:
        pass
    try:
        return str(tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, ValueError, KeyError):
        return "0+unknown"


@cache
def commit() -> str:
    """The commit of the checkout that this package runs from, marked where files differ from it; empty if unknown.

    A copy of a checkout without its history is told the commit by the environment variable ``COSPADI_COMMIT``.
    """
    if given := os.environ.get("COSPADI_COMMIT"):
        return given
    if not (SOURCE / ".git").exists():
        return ""
    try:
        changed = "-dirty" if _git("status", "-s", "-uno") else ""
        return _git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(SOURCE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


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
