"""Bytes on disk, from file sizes and headers alone."""

from pathlib import Path

from cospadi.checkpoint.formats.factored import read_config
from cospadi.checkpoint.headers import INDEX, SINGLE, read_directory, read_json
from cospadi.errors import CheckpointError
from cospadi.layers.tensors import module_tensors


def file_bytes(path: str | Path) -> int:
    """Bytes of a checkpoint's weight files (any checkpoint of safetensors, compressed or not).

    Raises:
        CheckpointError: if there are none, or one of the index is missing.
    """
    directory = Path(path)
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
    """Bytes of the factors of a compressed checkpoint (biases excluded), as they lie on disk.

    Raises:
        CheckpointError: if the directory is damaged.
    """
    directory = Path(path)
    entries = read_directory(directory)
    total = 0
    for group in read_config(directory):
        for index, module in enumerate(group.modules):
            for leaf in module_tensors(group, index):
                if f"{module}.{leaf}" not in entries:
                    raise CheckpointError(f"{directory}: tensor {module}.{leaf} is missing")
                total += entries[f"{module}.{leaf}"].bytes
    return total
