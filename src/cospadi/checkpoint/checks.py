"""Checks that the formats share: one tensor's header, its numbers, and reading it without building a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What stored floating-point tensors may be."""


def entry_of(entries: Mapping[str, Entry], name: str, where: Path) -> Entry:
    """One tensor on disk.

    Raises:
        CheckpointError: if it is missing.
    """
    if name not in entries:
        raise CheckpointError(f"{where}: tensor {name} is missing; copy the checkpoint again")
    return entries[name]


def check_entry(
    entry: Entry, name: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype] = FLOATS, why: str = ""
) -> None:
    """Check shape and dtype of one tensor on disk.

    Args:
        entry: from the header of its file.
        name: full name, for messages.
        shape: expected; None stands for any size.
        dtypes: those allowed.
        why: end of the message.

    Raises:
        CheckpointError: naming file and tensor.
    """
    fits = len(entry.shape) == len(shape) and all(s in (None, e) for s, e in zip(shape, entry.shape, strict=True))
    if not fits or entry.dtype not in dtypes:
        wanted = [size if size is not None else "any" for size in shape]
        kinds = " or ".join(map(str, dtypes))
        raise CheckpointError(
            f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, expected {kinds} {wanted}{why}"
        )


class FileTensors(Mapping[str, Tensor]):
    """The tensors of one module, read from disk when asked for.

    Args:
        entries: tensors on disk by full name.
        module: dotted name of the module.
    """

    def __init__(self, entries: Mapping[str, Entry], module: str) -> None:
        self._entries, self._module = entries, module

    def __getitem__(self, leaf: str) -> Tensor:
        name = f"{self._module}.{leaf}" if self._module else leaf
        file = self._entries[name].file
        try:
            with safe_open(file, framework="pt") as reader:
                tensor: Tensor = reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name.rpartition(".")[2] for name in self._entries if name.rpartition(".")[0] == self._module)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_all_finite(entries: Mapping[str, Entry]) -> None:
    """:func:`check_finite` for every module on disk."""
    for module in dict.fromkeys(name.rpartition(".")[0] for name in entries):
        check_finite(entries, module)


def check_finite(entries: Mapping[str, Entry], module: str) -> None:
    """Check that the floating-point tensors of one module on disk hold neither NaN nor Inf.

    Raises:
        CheckpointError: naming file and tensor.
    """
    for leaf, tensor in FileTensors(entries, module).items():
        readable = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if tensor.is_floating_point() and not bool(readable.isfinite().all()):
            name = f"{module}.{leaf}" if module else leaf
            raise CheckpointError(f"{entries[name].file}: tensor {name}: holds NaN or Inf")
