"""Groups of linear layers that share a dictionary and a rotation, or have none: ``y = (z D) S``, z = x or x rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cospadi.format.leaves import TensorTable, codes_tensors, dictionary_tensors, rotation_tensors
from cospadi.format.pack import Packed, pack, unpack
from cospadi.format.rotation import Rotation, StoredRotation, folded
from cospadi.format.schema import MatrixSpec, Stored
from cospadi.format.spec import GroupShape, PackedGroup

_KEYS = {"modules", "d_in", "d_out", "atoms", "dictionary", "codes", "method", "rotation"}


@dataclass(frozen=True)
class GroupSpec:
    """How one group of linear layers is stored.

    Attributes:
        modules: dotted names in the model; the first one holds the dictionary and the rotation.
        d_in: inputs, the same for all.
        d_out: outputs of each module.
        codes: the codes of all modules together: rows = sum of `d_out`.
        dictionary: None for an identity dictionary.
        method: the method that made it (for reports).
        rotation: of the input, before the dictionary; None for none.
    """

    modules: tuple[str, ...]
    d_in: int
    d_out: tuple[int, ...]
    codes: MatrixSpec
    dictionary: MatrixSpec | None = None
    method: str = ""
    rotation: Rotation | None = None

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
        codes = self.codes.bytes if self.stacked else sum(self.module_codes(i).bytes for i in range(len(self.modules)))
        rotation = self.rotation.bytes(self.d_in) if self.rotation else 0
        return codes + (self.dictionary.bytes if self.dictionary else 0) + rotation

    @property
    def version(self) -> int:
        """The first format version that can describe the group."""
        used = [self.codes.version, self.dictionary.version if self.dictionary else 1]
        return max(*used, 2 if self.rotation else 1)

    @property
    def stacked(self) -> bool:
        """Whether the modules' stored rows, one below the other, are the stored matrix `codes`.

        Trellis tiles never reach into another module: each module has its own padding.
        """
        trellis = self.codes.trellis
        return trellis is None or all(size % trellis.outputs == 0 for size in self.d_out[:-1])

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

    def lengths(self, role: str) -> list[int]:
        """First dimension of each module's part of a stored tensor of the codes: its rows, or rows of tiles."""
        trellis = self.codes.trellis
        if role == "values" and trellis is not None:
            return [trellis.tiles(size, 1)[0] for size in self.d_out]
        return list(self.d_out)

    def tensors(self, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
        """Shape and dtype of one module's tensors by parameter name, bias and guard excluded.

        Args:
            index: which of `modules`; the first one also holds the dictionary and the rotation.
            dtype: of the floating-point tensors.
        """
        table: TensorTable = {}
        if index == 0 and self.rotation is not None:
            table |= rotation_tensors(self.rotation, self.d_in, dtype)
        if index == 0 and self.dictionary is not None:
            table |= dictionary_tensors(self.dictionary, dtype)
        return table | codes_tensors(self.module_codes(index), dtype)

    def row(self, layer: int | None = None) -> dict[str, Any]:
        """The group as it stands in reports.

        Args:
            layer: index of its first decoder layer.
        """
        row: dict[str, Any] = {
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
        if self.codes.trellis is not None:
            row["trellis"] = self.codes.trellis.to_dict()
        if self.rotation is not None:
            row["rotation"] = self.rotation.to_dict()
        return row

    def weight(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The weights of all modules side by side, (d_in, sum of d_out) float64, that packed tensors stand for."""
        dictionary, codes = split_packed(packed)
        if self.stacked:
            rows = unpack(codes, self.codes, torch.float64)
        else:
            parts = split_codes(self, codes)
            rows = torch.cat([unpack(p, self.module_codes(i), torch.float64) for i, p in enumerate(parts)])
        if self.dictionary is not None and dictionary is not None:
            rows = rows @ unpack(dictionary, self.dictionary, torch.float64)
        if self.rotation is not None:
            rows = folded(rows, part_of(packed, "rotation"), self.rotation)
        return rows.T

    def rebuild(self, packed: Mapping[str, Tensor]) -> list[Tensor]:
        """The weight W (d_in, d_out) float64 of every module that packed tensors stand for."""
        return list(torch.split(self.weight(packed), list(self.d_out), 1))

    def solved_by(self, method: str) -> GroupSpec:
        """The same spec under the name of another method."""
        return replace(self, method=method)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""
        rotation = {} if self.rotation is None else {"rotation": self.rotation.to_dict()}
        return {
            "modules": list(self.modules),
            "d_in": self.d_in,
            "d_out": list(self.d_out),
            "atoms": self.atoms,
            "dictionary": None if self.dictionary is None else self.dictionary.to_dict(),
            "codes": self.codes.to_dict(),
            "method": self.method,
        } | rotation

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GroupSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: if the description is not one of a group.
        """
        try:
            atoms, d_in, d_out = int(data["atoms"]), int(data["d_in"]), tuple(int(n) for n in data["d_out"])
            dictionary = data["dictionary"]
            unknown = set(data) - _KEYS
            if unknown:
                raise ValueError(f"unknown keys {sorted(unknown)}")
            return cls(
                modules=tuple(str(m) for m in data["modules"]),
                d_in=d_in,
                d_out=d_out,
                codes=MatrixSpec.from_dict(sum(d_out), atoms, data["codes"]),
                dictionary=None if dictionary is None else MatrixSpec.from_dict(atoms, d_in, dictionary),
                method=str(data.get("method", "")),
                rotation=Rotation.from_dict(data["rotation"]) if "rotation" in data else None,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a group: {error}") from error


@dataclass(frozen=True)
class Factors:
    """What a method finds for a group: the dictionary (None: identity) and the codes of all modules, rows in order.

    Attributes:
        codes: Sᵀ, (sum of d_out, atoms); with a trellis the symbols of all modules, (sum of their tile rows, …).
        dictionary: Dᵀ, (atoms, d_in), or None.
        info: numbers for the report (rounds, losses …).
        rotation: of the input, or None.
    """

    codes: Stored
    dictionary: Stored | None = None
    info: dict[str, Any] = field(default_factory=dict)
    rotation: StoredRotation | None = None

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or Inf."""
        found = [self.rotation.scales if self.rotation else None]
        for stored in (self.dictionary, self.codes):
            found += [] if stored is None else [stored.matrix, stored.scales]
        return all(bool(tensor.isfinite().all()) for tensor in found if tensor is not None)

    def pack(self, spec: GroupSpec, dtype: torch.dtype) -> PackedGroup:
        """Packed tensors of the group, keyed ``dictionary.values``, ``codes.mask``, ``rotation.signs`` and so on.

        Args:
            spec: of the group.
            dtype: 16-bit float of values and scales.

        Raises:
            ValueError: if the numbers do not fit the spec.
        """
        if (self.rotation is None) != (spec.rotation is None):
            raise ValueError(f"{spec.name}: the spec and the factors must both have a rotation, or neither")
        tensors = {f"codes.{role}": t for role, t in self._packed_codes(spec, dtype).items()}
        if spec.dictionary is not None and self.dictionary is not None:
            tensors |= {f"dictionary.{role}": t for role, t in pack(self.dictionary, spec.dictionary, dtype).items()}
        if spec.rotation is not None and self.rotation is not None:
            rotation = self.rotation.pack(spec.rotation, spec.d_in, dtype)
            tensors |= {f"rotation.{role}": t for role, t in rotation.items()}
        return tensors

    def _packed_codes(self, spec: GroupSpec, dtype: torch.dtype) -> Packed:
        if spec.stacked or self.codes.scales is None:
            return pack(self.codes, spec.codes, dtype)
        lengths = spec.lengths("values")
        if len(self.codes.matrix) != sum(lengths):
            raise ValueError(f"{spec.name}: symbols have {len(self.codes.matrix)} rows of tiles, not {sum(lengths)}")
        symbols = torch.split(self.codes.matrix, lengths)
        scales = torch.split(self.codes.scales, list(spec.d_out))
        parts = [
            pack(Stored(own, scale), spec.module_codes(index), dtype)
            for index, (own, scale) in enumerate(zip(symbols, scales, strict=True))
        ]
        return {role: torch.cat([part[role] for part in parts]) for role in parts[0]}


def part_of(tensors: Mapping[str, Tensor], part: str) -> Packed:
    """Stored tensors of one part (``"codes"``, ``"dictionary"``, ``"rotation"``) of :meth:`Factors.pack`, by role."""
    return {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}


def split_packed(tensors: Mapping[str, Tensor]) -> tuple[Packed | None, Packed]:
    """Dictionary and codes of :meth:`Factors.pack`."""
    return part_of(tensors, "dictionary") or None, part_of(tensors, "codes")


def split_codes(spec: GroupSpec, codes: Packed) -> list[Packed]:
    """The codes of each module, as views."""
    parts = {role: torch.split(tensor, spec.lengths(role)) for role, tensor in codes.items()}
    return [{role: rows[index] for role, rows in parts.items()} for index in range(len(spec.modules))]
