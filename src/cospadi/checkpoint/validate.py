"""Check a compressed checkpoint of any format without building the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cospadi.checkpoint.checks import check_all_finite
from cospadi.checkpoint.checksums import check_checksums, has_checksums
from cospadi.checkpoint.formats.base import Format, format_of
from cospadi.checkpoint.headers import Entry, read_directory, read_json
from cospadi.errors import CheckpointError
from cospadi.io import expanded


def read_format(path: str | Path) -> tuple[Format[Any], tuple[Any, ...]]:
    """Format and specs of a checkpoint directory, from its ``config.json``.

    Raises:
        CheckpointError: if it is not of a registered format, of an unknown version, or impossible.
    """
    file = expanded(path) / "config.json"
    data = read_json(file).get("quantization_config")
    found = format_of(data)
    if found is None:
        raise CheckpointError(
            f"{file}: not a checkpoint of cospadi (quantization_config is missing or of another package)"
        )
    return found, found.parse(data, str(file))


def read_config(path: str | Path) -> tuple[Any, ...]:
    """Specs of a checkpoint directory, in the order in which they are stored.

    Raises:
        CheckpointError: see :func:`read_format`.
    """
    return read_format(path)[1]


def check_stock(path: str | Path) -> dict[str, Entry]:
    """Check the weight files of a checkpoint without quantisation: headers, numbers, and our ``SHA256SUMS``.

    Returns:
        its tensors.

    Raises:
        CheckpointError: naming file and tensor; or if it is of a format that is not registered.
    """
    directory = expanded(path)
    description = read_json(directory / "config.json").get("quantization_config")
    if description is not None:
        kind = description.get("quant_method") if isinstance(description, dict) else description
        raise CheckpointError(f"{path}: is stored in the format {kind!r} of another package: use that package for it")
    entries = read_directory(directory)
    check_all_finite(entries)
    if has_checksums(directory):
        check_checksums(directory)
    return entries


def validate(path: str | Path, *, deep: bool = True) -> tuple[Any, ...]:
    """Check a compressed checkpoint directory without building the model.

    Args:
        path: the directory.
        deep: also check the stored numbers and compare ``SHA256SUMS``; otherwise only the headers are read.

    Returns:
        its specs.

    Raises:
        CheckpointError: naming file and tensor.
    """
    directory = expanded(path)
    found, specs = read_format(directory)
    entries = read_directory(directory)
    found.check_headers(entries, specs, directory)
    if deep:
        found.check_data(entries, specs)
        check_checksums(directory)  # last: the checks above name the tensor
    return specs
