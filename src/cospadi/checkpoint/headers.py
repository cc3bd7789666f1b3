"""Headers of safetensors files, read without touching the data, and whether the files can hold what they claim."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a header.

    Attributes:
        file: where it lies.
        dtype: its dtype.
        shape: its shape.
        bytes: its size on disk.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is absent, not JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return data


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of one safetensors file.

    The header must be complete, every dtype known, and every shape fit its bytes; the tensors must fill the file
    without gap or overlap, so that reading them cannot run past its end.

    Args:
        path: a ``.safetensors`` file.

    Returns:
        the tensors by name.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: the file is truncated or not a safetensors file ({size:,} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; copy the checkpoint again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        entries[name], span = _entry(path, name, value)
        spans.append((*span, name))
    expected = 0
    for start, end, name in sorted(spans):
        if start != expected:
            raise CheckpointError(f"{path}: tensor {name} starts at byte {start}, expected {expected}")
        expected = end
    if size != 8 + length + expected:
        raise CheckpointError(f"{path}: the file has {size:,} bytes, its header promises {8 + length + expected:,}")
    return entries


def _entry(path: Path, name: str, value: Any) -> tuple[Entry, tuple[int, int]]:
    try:
        dtype, shape, (start, end) = DTYPES.get(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: tensor {name}: the header entry is damaged") from None
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name}: unknown dtype {value['dtype']!r}")
    if not whole or end - start != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: tensor {name}: shape {list(shape)} of {dtype} does not fit its bytes")
    return Entry(path, dtype, shape, end - start), (start, end)


def read_directory(directory: Path) -> dict[str, Entry]:
    """Tensors of a checkpoint directory, from its single file or from the files of the index.

    Raises:
        CheckpointError: if a file is missing or damaged, the index points outside the directory, or index and
            headers disagree.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {INDEX}")
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file in (".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index}: tensor {name} is in {file!r}, which is not a file name in this directory")
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_header(directory / file).items():
            if weight_map.get(name) != file:
                where = weight_map.get(name, "no file")
                raise CheckpointError(f"{directory / file}: holds tensor {name}, which the index puts in {where}")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise CheckpointError(f"{directory / file}: tensor {name} is missing")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("duplicate key")
    return data
