"""A linear layer whose weight is a combination of matrices shared with other layers, plus a low-rank part of its own.

MASA (arXiv 2508.04581): W_l ≈ Σ_s c_ls A_s + U_l V_l. The atoms A_s are stored once, in the first layer of their group.
With as many atoms as layers sharing would save nothing; every layer then keeps its own matrix exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cospadi.errors import ModelError
from cospadi.layers.stored_layer import StoredLayer
from cospadi.layers.tensors import TensorTable

METHOD = "masa"


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
    method: str = METHOD

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


class _Owner:
    """A reference to the layer that holds the atoms, without making it a submodule of the others."""

    def __init__(self, layer: SharedLinear) -> None:
        self.layer = layer


class SharedLinear(StoredLayer):
    """``y = x (Σ_s c_s A_s + U V)ᵀ + b``, the weight composed at every call.

    Parameters, all frozen when built: ``atoms`` (S, d_out, d_in) in the first layer of a group, ``coefficients`` (S,),
    ``down`` V (r, d_in) and ``up`` U (d_out, r). Those of size zero do not exist. A layer that keeps its own matrix has
    only ``matrix`` (d_out, d_in).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: SharedSpec,
        index: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Build a layer with unset tensors. The layers of a group must then be joined by :meth:`link`.

        Args:
            spec: how the group is stored.
            index: of this module in `spec.modules`.
            bias: whether there is a bias (d_out,).
            device: of the parameters, ``"meta"`` included.
            dtype: of the parameters.
        """
        super().__init__()
        self.spec = spec
        self.index = index
        self.in_features = spec.d_in
        self.out_features = spec.d_out
        self.owner: _Owner | None = None
        for name, (shape, kind) in spec.tensors(index, dtype).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), False))
        if bias:
            self.bias = nn.Parameter(torch.empty(spec.d_out, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @staticmethod
    def link(members: Sequence[SharedLinear]) -> None:
        """Join the layers of a group, in the order of `spec.modules`.

        Raises:
            ValueError: if they are not the members of one group in order.
        """
        spec = members[0].spec
        if [m.index for m in members] != list(range(len(spec.modules))) or any(m.spec != spec for m in members):
            raise ValueError(f"{spec.name}: the layers given are not its {len(spec.modules)} modules in order")
        owner = _Owner(members[0])
        for member in members:
            member.owner = owner

    @property
    def name(self) -> str:
        """Dotted name of the module in the model."""
        return self.spec.modules[self.index]

    def factors(self) -> dict[str, nn.Parameter]:
        """The atoms, coefficients and low-rank parts that this layer holds, by name."""
        held = {name: self._parameters[name] for name in self.spec.tensors(self.index)}
        return {name: parameter for name, parameter in held.items() if parameter is not None}

    def forward(self, x: Tensor, mixture: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (…, d_in).
            mixture: compute x (Σ_s mixture_s A_s)ᵀ instead. Other layers of the group ask for it while accelerate's
                hooks, which run at this call, have the atoms offloaded.

        Returns:
            (…, d_out).

        Raises:
            ModelError: if the layer holds no data, or was not joined to its group.
        """
        if mixture is not None:
            return self._mixed(x, mixture)
        factors = self.factors()
        if any(p.device.type == "meta" for p in factors.values()) and x.device.type != "meta":
            raise ModelError(f"{self.name}: the layer holds no data yet; load a checkpoint into the model first")
        y = functional.linear(x, factors["matrix"]) if self.spec.whole else None
        if "coefficients" in factors:
            y = self._shared(x, factors["coefficients"])
        if self.spec.ranks[self.index]:
            own = functional.linear(functional.linear(x, factors["down"]), factors["up"])
            y = own if y is None else y + own
        if y is None:
            y = x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _shared(self, x: Tensor, coefficients: Tensor) -> Tensor:
        layer = self._holder()
        where = layer.factors()["atoms"].device
        if where == x.device:
            return layer._mixed(x, coefficients)
        if where.type == "meta":  # offloaded: a call runs the hooks that bring its parameters
            result: Tensor = layer(x, mixture=coefficients)
        else:
            result = layer._mixed(x.to(where), coefficients.to(where))
        return result.to(x.device)

    def _mixed(self, x: Tensor, mixture: Tensor) -> Tensor:
        atoms = self.factors()["atoms"]
        weight = torch.tensordot(mixture.to(atoms.device, atoms.dtype), atoms, 1)
        return functional.linear(x.to(weight.device), weight)

    def _holder(self) -> SharedLinear:
        if self.owner is None:
            raise ModelError(f"{self.name}: the layer is not joined to its group {self.spec.name}")
        return self.owner.layer

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight as ``nn.Linear`` would hold it, composed in at least float32 and rounded once.

        Args:
            dtype: of the result; None for the dtype of the parameters.

        Returns:
            (d_out, d_in), on the device of the layer.
        """
        factors = self.factors()
        first = next(iter(factors.values()))
        dtype, device = dtype or first.dtype, first.device
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.zeros(self.out_features, self.in_features, dtype=wide, device=device)
        if self.spec.whole:
            weight += factors["matrix"]
        elif self.spec.atoms:
            atoms = self._holder().factors()["atoms"]
            for share, atom in zip(factors["coefficients"], atoms, strict=True):
                weight += share.to(wide) * atom.to(device, wide)
        if self.spec.ranks[self.index]:
            weight += factors["up"].to(wide) @ factors["down"].to(wide)
        return weight.to(dtype)

    def extra_repr(self) -> str:
        """Sizes in one line."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.spec.whole:
            return f"{sizes}, own matrix"
        held = "" if self.index == 0 or not self.spec.atoms else f" in {self.spec.modules[0]}"
        return f"{sizes}, atoms={self.spec.atoms}{held}, rank={self.spec.ranks[self.index]}"
