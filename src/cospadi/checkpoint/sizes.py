"""Bytes on disk, from file sizes and headers alone."""

from pathlib import Path

from cospadi.checkpoint.checks import entry_of
from cospadi.checkpoint.headers import INDEX, SINGLE, read_directory, read_json
from cospadi.checkpoint.validate import read_format
from cospadi.errors import CheckpointError
from cospadi.io import expanded


def file_bytes(path: str | Path) -> int:
    """Bytes of a checkpoint's weight files (any checkpoint of safetensors, compressed or not).

    Raises:
        CheckpointError: if there are none, or one of the index is missing.
    """
    directory = expanded(path)
    if (directory / SINGLE).exists():
        names = {SINGLE}
    else:
        weight_map = read_json(directory / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    try:
        return sum((directory / name).stat().st_size for name in names)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: the file is missing; copy the checkpoint again") from None


def factor_bytes(path: str | Path) -> int:
    """Bytes on disk of the tensors that a checkpoint's format stores: factors, without biases and guard.

    Raises:
        CheckpointError: if the directory is damaged or not of a registered format.
    """
    directory = expanded(path)
    stored, specs = read_format(directory)
    entries = read_directory(directory)
    return sum(entry_of(entries, name, directory).bytes for name in stored.names(specs))
