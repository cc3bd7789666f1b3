"""``cospadi``: linear layers stored as a dictionary and codes, the format of `cospadi compress` (docs/format.md).

The description lists groups as in :meth:`~cospadi.format.GroupSpec.to_dict`. The tensors are those of
:class:`~cospadi.layers.FactoredLinear`, by their parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cospadi.checkpoint.formats.base import FORMATS
from cospadi.checkpoint.formats.grouped import GroupedFormat
from cospadi.checkpoint.headers import Entry
from cospadi.checkpoint.mask_checks import check_codes, check_rotation
from cospadi.errors import CheckpointError
from cospadi.format import FORMAT_VERSION, GroupSpec, MatrixSpec
from cospadi.format.leaves import codes_name, dictionary_name, rotation_name
from cospadi.layers import FactoredLinear

_FIELD_TYPES = {"bits": int, "nonzeros": int, "group": int, "symmetric": bool, "half": bool, "pattern": str}


class FactoredFormat(GroupedFormat[GroupSpec]):
    """Dictionary and codes in packed tensors."""

    name = "cospadi"
    spec_type = GroupSpec
    layer_type = FactoredLinear
    version = FORMAT_VERSION

    def version_of(self, specs: Sequence[GroupSpec]) -> int:
        """See :meth:`Format.version_of`."""
        return max((spec.version for spec in specs), default=1)

    def read_body(self, data: Mapping[str, Any], where: str) -> tuple[GroupSpec, ...]:
        """See :meth:`Format.read_body`."""
        specs = super().read_body(data, where)
        declared, needed = data["format_version"], self.version_of(specs)
        if needed > declared:
            raise CheckpointError(
                f"{where}: format version {declared} is declared, but the description uses version {needed}: the file "
                "was changed; copy the checkpoint again"
            )
        return specs

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
        """From ``"codes.{role}"`` (rows of all modules in order), ``"dictionary.{role}"`` and ``"rotation.{role}"``.

        See the base class.
        """
        names = {"dictionary": dictionary_name, "rotation": rotation_name}
        for key, tensor in tensors.items():
            part, _, role = key.partition(".")
            if part in names:
                yield 0, names[part](role), tensor
            elif part != "codes" or len(tensor) != sum(spec.lengths(role)):
                raise ValueError(f"{key}: a tensor {list(tensor.shape)} does not fit group {spec.name}")
            else:
                for index, rows in enumerate(torch.split(tensor, spec.lengths(role))):
                    yield index, codes_name(role), rows

    def check_module(
        self, spec: GroupSpec, index: int, held: Mapping[str, Tensor], entries: Mapping[str, Entry]
    ) -> None:
        """Check masks against value counts, scales, and signs. See :meth:`GroupedFormat.check_module`."""
        faults = [(codes_name, _fault_of_matrix(spec.module_codes(index), codes_name, held))]
        if index == 0 and spec.dictionary is not None:
            faults.append((dictionary_name, _fault_of_matrix(spec.dictionary, dictionary_name, held)))
        if index == 0 and spec.rotation is not None:
            packed = {role: held[rotation_name(role)] for role in spec.rotation.tensors(spec.d_in)}
            faults.append((rotation_name, check_rotation(packed, spec.d_in)))
        for naming, fault in faults:
            if fault:
                role, _, what = fault.partition(": ")
                name = f"{spec.modules[index]}.{naming(role)}"
                file = f"{entries[name].file}: " if name in entries else ""
                raise CheckpointError(f"{file}tensor {name}: {what}")


def _fault_of_matrix(matrix: MatrixSpec, naming: Callable[[str], str], held: Mapping[str, Tensor]) -> str | None:
    return check_codes({role: held[naming(role)] for role in matrix.tensors() if role in ("mask", "scales")}, matrix)


FACTORED = FORMATS.add(FactoredFormat.name, FactoredFormat())
