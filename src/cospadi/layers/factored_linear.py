"""``FactoredLinear``: a linear layer that multiplies its dictionary and codes as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from cospadi.errors import ModelError
from cospadi.format import GroupSpec, Packed
from cospadi.kernels import factored_linear, is_traced
from cospadi.layers.factor_tensors import FactorTensors
from cospadi.layers.siblings import Siblings, own_product


class FactoredLinear(FactorTensors):
    """``y = (z D) S + b`` for one module of a group; z is x, or x rotated. It holds what `FactorTensors` says."""

    def __init__(
        self,
        group: GroupSpec,
        index: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Build a layer with unset tensors. The layers of a group must then be joined by :meth:`link`.

        Args:
            group: how the group is stored.
            index: of this module in `group.modules`.
            bias: whether there is a bias (d_out,).
            device: of the parameters, ``"meta"`` included.
            dtype: of the floating-point parameters.
        """
        super().__init__(group, index, bias, device, dtype)
        self.siblings: Siblings | None = None
        if len(group.modules) == 1:
            self.link([self])

    @staticmethod
    def link(members: Sequence[FactoredLinear]) -> None:
        """Join the layers of a group, in the order of `group.modules`.

        Raises:
            ValueError: if they are not the members of one group in order.
        """
        group = members[0].group
        if [m.index for m in members] != list(range(len(group.modules))) or any(m.group != group for m in members):
            raise ValueError(f"{group.name}: the layers given are not its {len(group.modules)} modules in order")
        siblings = Siblings(members)
        for member in members:
            member.siblings = siblings

    def packed_dictionary(self) -> Packed | None:
        """Stored tensors of the group's dictionary by role; None for an identity dictionary.

        Raises:
            ModelError: if another layer holds the dictionary and this one was not joined to it.
        """
        return self._owner().own_dictionary()

    def forward(self, x: Tensor, *, coordinates_only: bool = False) -> Tensor:
        """Apply the layer.

        Args:
            x: (…, d_in), of the dtype of the floating-point parameters, as for ``nn.Linear``.
            coordinates_only: return z D alone. Siblings ask for it while accelerate's hooks, which run at this call,
                have the dictionary offloaded.

        Returns:
            (…, d_out), or (…, atoms).

        Raises:
            ModelError: if the layer holds no data, or was not joined to its group.
        """
        held = self._parameters
        if x.device.type != "meta" and self.values.device.type == "meta":
            raise ModelError(f"{self.name}: the layer holds no data yet; load a checkpoint into the model first")
        if coordinates_only:
            return own_product(self, x)
        siblings = self.siblings or self._linked()
        if len(siblings.members) == 1:
            z = self.rotated(x)
            y = factored_linear(z, self.own_dictionary(), self.dictionary_spec, self.packed_codes(), self.codes_spec)
        elif is_traced():
            y = siblings.traced.output(x, self.index)
        else:
            siblings.traced.held = None  # left by a program that was not finished
            y = siblings.memo.output(x, self.index)
        bias = held["bias"]
        return y if bias is None else y + bias

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight as ``nn.Linear`` would hold it.

        Args:
            dtype: of the result; None for that of the floating-point parameters. Computed in at least float32.

        Returns:
            (d_out, d_in), on the device of the codes.
        """
        return self.dense_from(self.packed_dictionary(), self._owner().own_rotation(), dtype)

    def _owner(self) -> FactorTensors:
        return self if self.index == 0 else self._linked().owner

    def _linked(self) -> Siblings:
        if self.siblings is None:
            raise ModelError(f"{self.name}: the layer is not joined to its group {self.group.name}")
        return self.siblings

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.siblings is not None:
            self.siblings.parameters_moved()
        return self
