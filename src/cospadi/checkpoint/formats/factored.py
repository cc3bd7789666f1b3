"""What must hold of a compressed checkpoint before its numbers may be used.

Three levels: the description (`parse_config`), the shapes and dtypes in the file headers (`check_headers`), and the
data that steer reading other data (`check_codes`): a mask with one bit too many would shift every value after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cospadi.checkpoint.checksums import check_checksums
from cospadi.checkpoint.formats.width import WIDTH_METHOD
from cospadi.checkpoint.headers import Entry, read_directory, read_json
from cospadi.errors import CheckpointError
from cospadi.format import FORMAT_VERSION, GroupSpec, MatrixSpec, Packed
from cospadi.format.patterns import parse_pattern
from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE, codes_name, dictionary_name, module_tensors

QUANT_METHOD = "cospadi"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_ROWS_AT_ONCE = 1024
_FIELD_TYPES = {"bits": int, "nonzeros": int, "group": int, "symmetric": bool, "pattern": str}


def _read_version_1(data: Mapping[str, Any], where: str) -> tuple[GroupSpec, ...]:
    unknown = set(data) - {"quant_method", "format_version", "groups"}
    if unknown:
        raise CheckpointError(f"{where}: unknown keys {sorted(unknown)} in quantization_config")
    if not isinstance(data.get("groups"), list) or not data["groups"]:
        raise CheckpointError(f"{where}: quantization_config has no groups")
    groups = []
    for number, item in enumerate(data["groups"]):
        try:
            for part in ("codes", "dictionary"):
                for key, value in (item[part] or {}).items():
                    if key in _FIELD_TYPES and type(value) is not _FIELD_TYPES[key]:
                        raise ValueError(f"{part}: {key} is {value!r}")
            groups.append(GroupSpec.from_dict(item))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: group {number} of quantization_config is wrong: {error}") from None
    names = [name for group in groups for name in group.modules]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{where}: module {twice} belongs to two groups")
    return tuple(groups)


# One reader for every version ever written; none is ever removed.
READERS = {1: _read_version_1}


def parse_config(data: Any, where: str = "config.json") -> tuple[GroupSpec, ...]:
    """Groups of a ``quantization_config``.

    Args:
        data: the JSON object.
        where: file, for messages.

    Returns:
        the groups, in order.

    Raises:
        CheckpointError: if it is not ours, of an unknown version, or impossible.
    """
    if isinstance(data, Mapping) and data.get("quant_method") == WIDTH_METHOD:
        raise CheckpointError(
            f"{where}: the model is width-pruned and has no factors; evaluate, generate and load take it as it is"
        )
    if not isinstance(data, Mapping) or data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: not a checkpoint of cospadi (quantization_config says otherwise or is missing)"
        )
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format_version is {version!r}")
    if version not in READERS:
        raise CheckpointError(
            f"{where}: format version {version} is unknown (known: up to {FORMAT_VERSION}); upgrade cospadi"
        )
    return READERS[version](data, where)


def read_config(path: str | Path) -> tuple[GroupSpec, ...]:
    """Groups of a checkpoint directory, from its ``config.json``.

    Raises:
        CheckpointError: see :func:`parse_config`.
    """
    file = Path(path) / "config.json"
    return parse_config(read_json(file).get("quantization_config"), str(file))


def check_headers(entries: Mapping[str, Entry], groups: Sequence[GroupSpec], where: Path) -> None:
    """Check that every tensor of the groups is there with its shape and dtype, and no other.

    Args:
        entries: tensors on disk, by full name.
        groups: the description.
        where: the directory, for messages.

    Raises:
        CheckpointError: naming file and tensor.
    """
    owned: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        owned.setdefault(module, {})[leaf] = entry
    for number, group in enumerate(groups):
        for index, module in enumerate(group.modules):
            found: dict[str, Entry] = dict(owned.get(module, {}))
            for leaf, (shape, dtype) in module_tensors(group, index).items():
                if leaf not in found:
                    raise CheckpointError(f"{where}: tensor {module}.{leaf} is missing")
                entry = found.pop(leaf)
                if dtype.is_floating_point and entry.dtype in FLOATS:
                    dtype = entry.dtype
                _expect(entry, f"{module}.{leaf}", shape, dtype)
            bias = found.pop("bias", None)
            if bias is not None:
                _expect(bias, f"{module}.bias", (group.d_out[index],), bias.dtype)
            guard = found.pop(GUARD, None)
            if number == 0 and index == 0:
                if guard is None:
                    raise CheckpointError(f"{where}: tensor {module}.{GUARD} is missing")
                _expect(guard, f"{module}.{GUARD}", GUARD_SHAPE, GUARD_DTYPE)
            elif guard is not None:
                found[GUARD] = guard
            for leaf, extra in found.items():
                raise CheckpointError(f"{extra.file}: tensor {module}.{leaf} does not belong to a compressed layer")


def _expect(entry: Entry, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if entry.shape != shape or entry.dtype != dtype:
        raise CheckpointError(
            f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}"
        )


def popcounts(words: Tensor) -> dict[int, Tensor]:
    """Set bits of int32 words, in every field of 4, 8, 16 and 32 bits, packed as the fields lie.

    Args:
        words: int32, any shape.

    Returns:
        by field width m: int32 words whose m-bit fields hold the counts.
    """
    # Signed shifts drag the sign bit along; the masks remove it.
    pairs = words - ((words >> 1) & 0x55555555)
    four = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eight = (four + (four >> 4)) & 0x0F0F0F0F
    sixteen = (eight + (eight >> 8)) & 0x00FF00FF
    return {4: four, 8: eight, 16: sixteen, 32: (sixteen + (sixteen >> 16)) & 0xFF}


def _expected_fields(columns: int, n: int, m: int) -> Tensor:
    """Counts per m-bit field that the pattern n:m asks for, packed into int32 words (words,)."""
    words = []
    for word in range(-(-columns // 32)):
        packed = 0
        for field in range(32 // m):
            here = min(max(columns - word * 32 - field * m, 0), m)
            packed |= -(-n * here // m) << (field * m)
        words.append(packed)
    return torch.tensor(words, dtype=torch.int32)  # a count of at most m leaves the top bit of its field free


def check_codes(packed: Packed, spec: MatrixSpec) -> str | None:
    """Check masks against value counts, and scales.

    Args:
        packed: tensors by role, shapes as the spec says.
        spec: of the matrix.

    Returns:
        None if all is well, else ``"role: what is wrong"``.
    """
    scales = packed.get("scales")
    if scales is not None and not bool(scales.isfinite().all()):
        return "scales: not all finite"
    return _check_mask(packed["mask"], spec) if spec.sparse else None


def _check_mask(mask: Tensor, spec: MatrixSpec) -> str | None:
    balanced = parse_pattern(spec.pattern)
    tail = spec.columns % 32
    outside = -1 << tail if tail else 0
    expected = torch.zeros(0) if balanced is None else _expected_fields(spec.columns, *balanced).to(mask.device)
    for begin in range(0, spec.rows, _ROWS_AT_ONCE):
        rows = mask[begin : begin + _ROWS_AT_ONCE]
        if outside and bool((rows[:, -1] & outside).any()):
            return f"mask: bits beyond its {spec.columns} atoms are set"
        counts = popcounts(rows)
        total = counts[32].sum(1)
        wrong = total != spec.nonzeros
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            return f"mask: row {begin + row} marks {int(total[row])} values, {spec.nonzeros} are stored"
        if balanced is not None:
            broken = counts[balanced[1]].ne(expected).any(1)
            if bool(broken.any()):
                return f"mask: row {begin + int(broken.nonzero()[0, 0])} breaks the pattern {spec.pattern}"
    return None


def check_group(
    group: GroupSpec, index: int, fetch: Mapping[str, Tensor], file_of: Mapping[str, Path] | None = None
) -> None:
    """Check the data of one module of a group.

    Args:
        group: the group.
        index: which module.
        fetch: its tensors by parameter name.
        file_of: the file of each tensor by full name, for messages.

    Raises:
        CheckpointError: naming file (where known) and tensor.
    """
    parts = [(group.module_codes(index), codes_name)]
    if index == 0 and group.dictionary is not None:
        parts.append((group.dictionary, dictionary_name))
    for spec, naming in parts:
        wanted = {role: naming(role) for role in spec.tensors() if role in ("mask", "scales")}
        fault = check_codes({role: fetch[name] for role, name in wanted.items()}, spec)
        if fault:
            role, _, what = fault.partition(": ")
            name = f"{group.modules[index]}.{wanted[role]}"
            file = (file_of or {}).get(name)
            raise CheckpointError(f"{f'{file}: ' if file else ''}tensor {name}: {what}")


class FileTensors(Mapping[str, Tensor]):
    """The tensors of one module, read from disk when asked for."""

    def __init__(self, entries: Mapping[str, Entry], module: str) -> None:
        self._entries, self._module = entries, module

    def __getitem__(self, leaf: str) -> Tensor:
        name = f"{self._module}.{leaf}"
        file = self._entries[name].file
        try:
            with safe_open(file, framework="pt") as reader:
                tensor: Tensor = reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from None
        return tensor

    def __iter__(self) -> Any:
        return (name.rpartition(".")[2] for name in self._entries if name.rpartition(".")[0] == self._module)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _check_finite(tensors: Mapping[str, Tensor], module: str, file_of: Mapping[str, Path]) -> None:
    for leaf in tensors:
        tensor = tensors[leaf]
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            name = f"{module}.{leaf}"
            raise CheckpointError(f"{file_of[name]}: tensor {name}: holds NaN or Inf")


def validate(path: str | Path, *, deep: bool = True) -> tuple[GroupSpec, ...]:
    """Check a compressed checkpoint directory without building the model.

    Args:
        path: the directory.
        deep: also read every tensor of the groups and compare ``SHA256SUMS``; otherwise the headers only.

    Returns:
        its groups.

    Raises:
        CheckpointError: naming file and tensor.
    """
    directory = Path(path)
    groups = read_config(directory)
    entries = read_directory(directory)
    check_headers(entries, groups, directory)
    if deep:
        files = {name: entry.file for name, entry in entries.items()}
        for group in groups:
            for index, module in enumerate(group.modules):
                check_group(group, index, FileTensors(entries, module), files)
                _check_finite(FileTensors(entries, module), module, files)
        check_checksums(directory)  # last: the checks above name the tensor
    return groups
