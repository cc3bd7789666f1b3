"""Tensors that the model's class does not take, such as extra heads: a weight file of their own beside its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cospadi.checkpoint.headers import INDEX, SINGLE, Entry, read_header, read_json
from cospadi.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

EXTRA = {"format": "pt", "part": "extra"}
"""Metadata of a weight file that holds only tensors which do not belong to the model's class."""


def add_extra(directory: Path, extra: Mapping[str, Entry], parameters: int) -> None:
    """Add a weight file with copies of tensors to a checkpoint, and list them in its index.

    Files and index are named as transformers names them, so whoever reads all files of the index finds them.

    Args:
        directory: of a finished checkpoint.
        extra: where the tensors are now, by the names under which they are stored.
        parameters: of the model, for the index.
    """
    if (directory / SINGLE).exists():
        held = read_header(directory / SINGLE)
        metadata = {"total_parameters": parameters, "total_size": sum(entry.bytes for entry in held.values())}
        index: dict[str, Any] = {"metadata": metadata, "weight_map": dict.fromkeys(held, SINGLE)}
    else:
        index = read_json(directory / INDEX)
    files = sorted(set(index["weight_map"].values()))
    total = len(files) + 1
    renamed = {old: f"model-{number:05d}-of-{total:05d}.safetensors" for number, old in enumerate(files, 1)}
    for old, new in renamed.items():
        (directory / old).rename(directory / new)
    last = f"model-{total:05d}-of-{total:05d}.safetensors"
    save_file(_read(extra), directory / last, EXTRA)
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()} | dict.fromkeys(
        extra, last
    )
    index["metadata"]["total_size"] += sum(entry.bytes for entry in extra.values())
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted({entry.file for entry in entries.values()}):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name, entry in entries.items() if entry.file == path}
    return found


def extra_names(directory: Path) -> frozenset[str]:
    """Names of the tensors of a checkpoint that :func:`add_extra` put there.

    Raises:
        CheckpointError: if a weight file cannot be read.
    """
    found: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("part") == EXTRA["part"]:
                    found |= set(file.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return frozenset(found)
