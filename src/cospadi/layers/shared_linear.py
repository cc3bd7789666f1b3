"""A linear layer whose weight is a combination of matrices shared with other layers, plus a low-rank part of its own.

MASA (arXiv 2508.04581): W_l ≈ Σ_s c_ls A_s + U_l V_l. The atoms A_s are stored once, in the first layer of their group.
With as many atoms as layers sharing would save nothing; every layer then keeps its own matrix exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cospadi.errors import ModelError
from cospadi.format import SharedSpec
from cospadi.layers.computed_linear import ComputedLinear


class _Owner:
    """References to the layers of a group, the first of which holds the atoms, without making them submodules."""

    def __init__(self, members: Sequence[SharedLinear]) -> None:
        self.members = tuple(members)

    @property
    def layer(self) -> SharedLinear:
        return self.members[0]


class SharedLinear(ComputedLinear):
    """``y = x (Σ_s c_s A_s + U V)ᵀ + b``, the weight composed at every call.

    Parameters, all frozen when built: ``atoms`` (S, d_out, d_in) in the first layer of a group, ``coefficients`` (S,),
    ``down`` V (r, d_in) and ``up`` U (d_out, r). Those of size zero do not exist. A layer that keeps its own matrix has
    only ``matrix`` (d_out, d_in).
    """

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
        super().__init__(spec.d_in, spec.d_out)
        self.spec = spec
        self.index = index
        self._built_dtype = dtype
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
        owner = _Owner(members)
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

    @property
    def weight_like(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the computed weight; those of the group's tensors where the layer itself has none."""
        members = self.owner.members if self.owner is not None else ()
        for layer in (self, *members):
            for tensor in layer.factors().values():
                return tensor.dtype, tensor.device
        return self._built_dtype, torch.device("cpu")

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight as ``nn.Linear`` would hold it, composed in at least float32 and rounded once.

        Args:
            dtype: of the result; None for the dtype of the parameters.

        Returns:
            (d_out, d_in), on the device of the layer.
        """
        factors = self.factors()
        own, device = self.weight_like
        dtype = dtype or own
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
