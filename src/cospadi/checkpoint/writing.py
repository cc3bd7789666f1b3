"""The one way in which a model becomes files, whether compressed, pruned or exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from cospadi.checkpoint.checksums import write_checksums
from cospadi.checkpoint.fitting import check_opens
from cospadi.checkpoint.headers import INDEX, SINGLE, Entry, read_header, read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA = {"format": "pt", "part": "extra"}
"""Metadata of a weight file that holds only tensors which do not belong to the model's class."""


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    extra: Mapping[str, Entry] | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write weights, configuration, generation settings, tokenizer and checksums.

    Args:
        model: stock, or marked as one of a format.
        tokenizer: None for none.
        directory: where to write.
        extra: tensors of the checkpoint that the model was read from which its class does not take; they are copied
            byte for byte into a weight file of their own.
        max_shard_size: of one weight file, as transformers takes it.

    Raises:
        CheckpointError: if what was written cannot be opened.
        OSError, SafetensorError: if a file cannot be written.
    """
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if extra:
        _add_file(directory, extra, model.num_parameters())
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_checksums(directory)
    check_opens(directory, extra or {})


def _add_file(directory: Path, extra: Mapping[str, Entry], parameters: int) -> None:
    """Add a weight file with copies of tensors; files and index are named as transformers names them."""
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
