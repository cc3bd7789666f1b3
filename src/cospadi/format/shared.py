"""Groups of linear layers that share matrix atoms across decoder layers: W_l ≈ Σ_s c_ls A_s + U_l V_l (MASA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cospadi.format.leaves import TensorTable
from cospadi.format.spec import GroupShape, PackedGroup


@dataclass(frozen=True)
class SharedSpec:
    """How one projection of several layers is stored. All numbers are 16-bit floats.

    Attributes:
        modules: dotted names in the model, in the order of the layers; the first one holds the atoms.
        d_in: inputs, the same for all.
        d_out: outputs, the same for all.
        atoms: S, full-size matrices that all of them share; 0 for none; as many as modules: each keeps its own.
        ranks: of each module's own low-rank part; 0 for none.
        method: the method that made it (for reports).
    """

    modules: tuple[str, ...]
    d_in: int
    d_out: int
    atoms: int
    ranks: tuple[int, ...]
    method: str = "masa"

    def __post_init__(self) -> None:
        if not self.modules or len(self.modules) != len(self.ranks):
            raise ValueError(f"{len(self.modules)} modules but {len(self.ranks)} ranks")
        if self.d_in < 1 or self.d_out < 1:
            raise ValueError(f"a matrix of {self.d_out}x{self.d_in} cannot be stored")
        if not 0 <= self.atoms <= len(self.modules):
            raise ValueError(f"{self.atoms} atoms for {len(self.modules)} modules")
        for module, rank in zip(self.modules, self.ranks, strict=True):
            if not 0 <= rank <= min(self.d_in, self.d_out):
                raise ValueError(f"{module}: a rank of {rank} is not possible for {self.d_out}x{self.d_in}")
            if rank and self.whole:
                raise ValueError(f"{module}: a layer that keeps its matrix has no low-rank part, but rank {rank}")

    @property
    def name(self) -> str:
        """Readable name: that of the modules, with the layers from first to last."""
        first, last = self.modules[0].split("."), self.modules[-1].split(".")
        if len(first) != len(last):
            return f"{self.modules[0]}-{self.modules[-1]}"
        return ".".join(a if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))

    @property
    def whole(self) -> bool:
        """Whether every layer keeps its own matrix."""
        return self.atoms == len(self.modules)

    @property
    def bytes(self) -> int:
        """Exact bytes of atoms, coefficients and low-rank parts (biases excluded)."""
        if self.whole:
            return self.dense_bytes
        shared = self.atoms * (self.d_in * self.d_out + len(self.modules))
        return 2 * (shared + sum(self.ranks) * (self.d_in + self.d_out))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same layers at 16 bits a weight."""
        return 2 * self.d_in * self.d_out * len(self.modules)

    def tensors(self, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
        """Shape and dtype of one module's tensors by parameter name, bias and guard excluded."""
        if self.whole:
            return {"matrix": ((self.d_out, self.d_in), dtype)}
        table: TensorTable = {}
        if self.atoms:
            if index == 0:
                table["atoms"] = ((self.atoms, self.d_out, self.d_in), dtype)
            table["coefficients"] = ((self.atoms,), dtype)
        if self.ranks[index]:
            table["down"] = ((self.ranks[index], self.d_in), dtype)
            table["up"] = ((self.d_out, self.ranks[index]), dtype)
        return table

    @property
    def shape(self) -> GroupShape:
        """Names and sizes of the layers."""
        return GroupShape(self.modules, self.d_in, (self.d_out,) * len(self.modules))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""
        return {
            "modules": list(self.modules),
            "d_in": self.d_in,
            "d_out": self.d_out,
            "atoms": self.atoms,
            "ranks": list(self.ranks),
        }

    def row(self, layer: int | None = None) -> dict[str, Any]:
        """The group as it stands in reports.

        Args:
            layer: index of the first of its decoder layers.
        """
        return {
            "name": self.name,
            "layer": layer,
            "modules": list(self.modules),
            "method": self.method,
            "atoms": None if self.whole else self.atoms,
            "ranks": list(self.ranks),
            "nonzeros": None,
            "pattern": "dense",
            "bits": {"dictionary": 16 if self.atoms and not self.whole else None, "values": 16},
            "bytes": self.bytes,
            "bytes_before": self.dense_bytes,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SharedSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: if the description is not one of a group of shared layers.
        """
        try:
            numbers = [data["d_in"], data["d_out"], data["atoms"], *data["ranks"]]
            modules = tuple(data["modules"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a group of shared layers: {error}") from error
        if any(type(n) is not int for n in numbers) or any(type(name) is not str for name in modules):
            raise ValueError("sizes, atoms and ranks must be whole numbers, modules names")
        return cls(modules, data["d_in"], data["d_out"], data["atoms"], tuple(data["ranks"]))

    def rebuild(self, packed: Mapping[str, Tensor]) -> list[Tensor]:
        """The weight W (d_in, d_out) float64 of every module that packed tensors stand for.

        Raises:
            ValueError: if a tensor is missing or has another shape than the spec says.
        """
        for index in range(len(self.modules)):
            for leaf, (shape, _) in self.tensors(index).items():
                tensor = packed.get(f"{index}.{leaf}")
                if tensor is None or tuple(tensor.shape) != shape:
                    raise ValueError(f"{self.modules[index]}.{leaf} is missing or not {list(shape)}")
        weights = []
        if self.whole:
            return [packed[f"{index}.matrix"].double().T for index in range(len(self.modules))]
        for index in range(len(self.modules)):
            device = next(iter(packed.values())).device
            weight = torch.zeros(self.d_out, self.d_in, dtype=torch.float64, device=device)
            if self.atoms:
                for share, atom in zip(packed[f"{index}.coefficients"].tolist(), packed["0.atoms"], strict=True):
                    weight += share * atom.double()
            if self.ranks[index]:
                weight += packed[f"{index}.up"].double() @ packed[f"{index}.down"].double()
            weights.append(weight.T)
        return weights

    def weight(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The weights of all modules side by side, (d_in, sum of d_out) float64."""
        return torch.cat(self.rebuild(packed), 1)

    def solved_by(self, method: str) -> SharedSpec:
        """The same spec under the name of another method."""
        return replace(self, method=method)


@dataclass(frozen=True)
class SharedFactors:
    """What a solve finds: numbers as they are stored, already rounded.

    Attributes:
        atoms: (S, d_out, d_in); with S = L the matrices of the layers themselves.
        coefficients: (L, S).
        down: of each layer (r_l, d_in).
        up: of each layer (d_out, r_l).
    """

    atoms: Tensor
    coefficients: Tensor
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or Inf."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors().values())

    def pack(self, spec: SharedSpec, dtype: torch.dtype) -> PackedGroup:
        """The stored tensors; they were rounded to `dtype` while they were fitted."""
        return self.tensors()

    def tensors(self) -> PackedGroup:
        """By ``"{index}.{parameter}"``, as the layers hold them; those of size zero are left out."""
        if len(self.atoms) == len(self.down):
            return {f"{index}.matrix": matrix.contiguous() for index, matrix in enumerate(self.atoms)}
        found = {"0.atoms": self.atoms}
        for index, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            found |= {f"{index}.coefficients": self.coefficients[index], f"{index}.down": down, f"{index}.up": up}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor.numel()}
