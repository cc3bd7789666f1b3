"""Groups of linear layers that share a dictionary, or have none: ``y = (x D) S``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cospadi.format.leaves import TensorTable, codes_tensors, dictionary_tensors
from cospadi.format.pack import Packed, pack, unpack
from cospadi.format.schema import MatrixSpec, Stored
from cospadi.format.spec import GroupShape, PackedGroup


@dataclass(frozen=True)
class GroupSpec:
    """How one group of linear layers is stored.

    Attributes:
        modules: dotted names in the model; the first one holds the dictionary.
        d_in: inputs, the same for all.
        d_out: outputs of each module.
        codes: the codes of all modules together: rows = sum of `d_out`.
        dictionary: None for an identity dictionary.
        method: the method that made it (for reports).
    """

    modules: tuple[str, ...]
    d_in: int
    d_out: tuple[int, ...]
    codes: MatrixSpec
    dictionary: MatrixSpec | None = None
    method: str = ""

    def __post_init__(self) -> None:
        if len(self.modules) != len(self.d_out):
            raise ValueError(f"{len(self.modules)} modules but {len(self.d_out)} output sizes")
        if self.codes.rows != sum(self.d_out):
            raise ValueError(f"codes have {self.codes.rows} rows, the modules {sum(self.d_out)}")
        if self.dictionary is not None and self.dictionary.columns != self.d_in:
            raise ValueError(f"dictionary reads {self.dictionary.columns} inputs, the modules {self.d_in}")
        if self.codes.columns != self.atoms:
            raise ValueError(f"codes read {self.codes.columns} atoms, the dictionary has {self.atoms}")

    @property
    def atoms(self) -> int:
        """Atoms of the dictionary; d_in for the identity."""
        return self.d_in if self.dictionary is None else self.dictionary.rows

    @property
    def name(self) -> str:
        """Readable name: the first module, and the last parts of the others."""
        return "+".join([self.modules[0], *(m.rsplit(".", 1)[-1] for m in self.modules[1:])])

    @property
    def bytes(self) -> int:
        """Exact bytes of all stored tensors of the group (biases excluded)."""
        return self.codes.bytes + (self.dictionary.bytes if self.dictionary else 0)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same layers at 16 bits a weight."""
        return 2 * self.d_in * sum(self.d_out)

    @property
    def shape(self) -> GroupShape:
        """Names and sizes of the layers."""
        return GroupShape(self.modules, self.d_in, self.d_out)

    def module_codes(self, index: int) -> MatrixSpec:
        """Codes of one module."""
        return replace(self.codes, rows=self.d_out[index])

    def tensors(self, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
        """Shape and dtype of one module's tensors by parameter name, bias and guard excluded.

        Args:
            index: which of `modules`; the first one also holds the dictionary.
            dtype: of the floating-point tensors.
        """
        table: TensorTable = {}
        if index == 0 and self.dictionary is not None:
            table |= dictionary_tensors(self.dictionary, dtype)
        return table | codes_tensors(self.module_codes(index), dtype)

    def row(self, layer: int | None = None) -> dict[str, Any]:
        """The group as it stands in reports.

        Args:
            layer: index of its first decoder layer.
        """
        return {
            "name": self.name,
            "layer": layer,
            "modules": list(self.modules),
            "method": self.method,
            "atoms": self.atoms if self.dictionary else None,
            "nonzeros": self.codes.nonzeros if self.codes.sparse else None,
            "pattern": self.codes.pattern,
            "bits": {"dictionary": self.dictionary.bits if self.dictionary else None, "values": self.codes.bits},
            "bytes": self.bytes,
            "bytes_before": self.dense_bytes,
        }

    def weight(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The weights of all modules side by side, (d_in, sum of d_out) float64, that packed tensors stand for."""
        dictionary, codes = split_packed(packed)
        rows = unpack(codes, self.codes, torch.float64)
        if self.dictionary is None or dictionary is None:
            return rows.T
        return unpack(dictionary, self.dictionary, torch.float64).T @ rows.T

    def rebuild(self, packed: Mapping[str, Tensor]) -> list[Tensor]:
        """The weight W (d_in, d_out) float64 of every module that packed tensors stand for."""
        return list(torch.split(self.weight(packed), list(self.d_out), 1))

    def solved_by(self, method: str) -> GroupSpec:
        """The same spec under the name of another method."""
        return replace(self, method=method)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""
        return {
            "modules": list(self.modules),
            "d_in": self.d_in,
            "d_out": list(self.d_out),
            "atoms": self.atoms,
            "dictionary": None if self.dictionary is None else self.dictionary.to_dict(),
            "codes": self.codes.to_dict(),
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GroupSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: if the description is not one of a group.
        """
        try:
            atoms, d_in, d_out = int(data["atoms"]), int(data["d_in"]), tuple(int(n) for n in data["d_out"])
            dictionary = data["dictionary"]
            return cls(
                modules=tuple(str(m) for m in data["modules"]),
                d_in=d_in,
                d_out=d_out,
                codes=MatrixSpec.from_dict(sum(d_out), atoms, data["codes"]),
                dictionary=None if dictionary is None else MatrixSpec.from_dict(atoms, d_in, dictionary),
                method=str(data.get("method", "")),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a group: {error}") from error


@dataclass(frozen=True)
class Factors:
    """What a method finds for a group: the dictionary (None: identity) and the codes of all modules, rows in order.

    Attributes:
        codes: Sᵀ, (sum of d_out, atoms).
        dictionary: Dᵀ, (atoms, d_in), or None.
        info: numbers for the report (rounds, losses …).
    """

    codes: Stored
    dictionary: Stored | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or Inf."""
        stored = (self.dictionary, self.codes)
        return all(bool(item.matrix.isfinite().all()) for item in stored if item is not None)

    def pack(self, spec: GroupSpec, dtype: torch.dtype) -> PackedGroup:
        """Packed tensors of the group, keyed ``dictionary.values``, ``codes.mask`` and so on.

        Args:
            spec: of the group.
            dtype: 16-bit float of values and scales.
        """
        tensors = {f"codes.{role}": t for role, t in pack(self.codes, spec.codes, dtype).items()}
        if spec.dictionary is not None and self.dictionary is not None:
            tensors |= {f"dictionary.{role}": t for role, t in pack(self.dictionary, spec.dictionary, dtype).items()}
        return tensors


def split_packed(tensors: Mapping[str, Tensor]) -> tuple[Packed | None, Packed]:
    """Dictionary and codes of :meth:`Factors.pack`."""
    parts: dict[str, Packed] = {"dictionary": {}, "codes": {}}
    for key, tensor in tensors.items():
        side, role = key.split(".", 1)
        parts[side][role] = tensor
    return parts["dictionary"] or None, parts["codes"]
