"""``cospadi``: linear layers stored as a dictionary and codes, the format of `cospadi compress` (docs/format.md).

The description lists groups as in :meth:`~cospadi.format.GroupSpec.to_dict`. The tensors are those of
:class:`~cospadi.layers.FactoredLinear`, by their parameter names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cospadi.checkpoint.formats.base import FORMATS
from cospadi.checkpoint.formats.grouped import GroupedFormat
from cospadi.checkpoint.headers import Entry
from cospadi.checkpoint.mask_checks import check_codes
from cospadi.errors import CheckpointError
from cospadi.format import FORMAT_VERSION, GroupSpec
from cospadi.format.leaves import codes_name, dictionary_name
from cospadi.layers import FactoredLinear

_FIELD_TYPES = {"bits": int, "nonzeros": int, "group": int, "symmetric": bool, "pattern": str}


class FactoredFormat(GroupedFormat[GroupSpec]):
    """Dictionary and codes in packed tensors."""

    name = "cospadi"
    spec_type = GroupSpec
    layer_type = FactoredLinear
    version = FORMAT_VERSION

    def read_group(self, data: dict[str, Any]) -> GroupSpec:
        """See :meth:`GroupedFormat.read_group`."""
        for part in ("codes", "dictionary"):
            for key, value in (data[part] or {}).items():
                if key in _FIELD_TYPES and type(value) is not _FIELD_TYPES[key]:
                    raise ValueError(f"{part}: {key} is {value!r}")
        return GroupSpec.from_dict(data)

    def shape(self, spec: GroupSpec, index: int) -> tuple[int, int]:
        """See :meth:`GroupedFormat.shape`."""
        return spec.d_out[index], spec.d_in

    def part(self, spec: GroupSpec, kept: Sequence[int]) -> GroupSpec:
        """The same dictionary with the codes of fewer modules. See :meth:`Format.part`."""
        if kept[0] != 0 and spec.dictionary is not None:
            return super().part(spec, kept)
        d_out = tuple(spec.d_out[index] for index in kept)
        codes = replace(spec.codes, rows=sum(d_out))
        return replace(spec, modules=tuple(spec.modules[index] for index in kept), d_out=d_out, codes=codes)

    def placed(self, layer: FactoredLinear) -> tuple[GroupSpec, int]:
        """See :meth:`GroupedFormat.placed`."""
        return layer.group, layer.index

    def split(self, spec: GroupSpec, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, str, Tensor]]:
        """From ``"codes.{role}"`` (rows of all modules in order) and ``"dictionary.{role}"``; see the base class."""
        for key, tensor in tensors.items():
            part, _, role = key.partition(".")
            if part == "dictionary":
                yield 0, dictionary_name(role), tensor
            elif part != "codes" or len(tensor) != sum(spec.d_out):
                raise ValueError(f"{key}: a tensor {list(tensor.shape)} does not fit group {spec.name}")
            else:
                for index, rows in enumerate(torch.split(tensor, list(spec.d_out))):
                    yield index, codes_name(role), rows

    def check_module(
        self, spec: GroupSpec, index: int, held: Mapping[str, Tensor], entries: Mapping[str, Entry]
    ) -> None:
        """Check masks against value counts, and scales. See :meth:`GroupedFormat.check_module`."""
        parts = [(spec.module_codes(index), codes_name)]
        if index == 0 and spec.dictionary is not None:
            parts.append((spec.dictionary, dictionary_name))
        for matrix, naming in parts:
            wanted = {role: naming(role) for role in matrix.tensors() if role in ("mask", "scales")}
            fault = check_codes({role: held[name] for role, name in wanted.items()}, matrix)
            if fault:
                role, _, what = fault.partition(": ")
                name = f"{spec.modules[index]}.{wanted[role]}"
                file = f"{entries[name].file}: " if name in entries else ""
                raise CheckpointError(f"{file}tensor {name}: {what}")


FACTORED = FORMATS.add(FactoredFormat.name, FactoredFormat())
