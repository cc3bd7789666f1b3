"""The codes of all siblings behind each other in one storage, so that one product serves the group."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from cospadi.format import Packed
from cospadi.layers.factor_tensors import FactorTensors

FEW_TOKENS = 16
"""Up to this many rows of x the outputs are computed together; with more, the cost of launches no longer matters."""

JOINED_ON = ("cuda",)
"""Device types where a launch costs so much that joining the codes pays."""


def few_tokens(x: Tensor) -> bool:
    """Whether x (…, d_in) has at most `FEW_TOKENS` rows; False where a compiler does not know."""
    return guard_or_false(prod(x.shape[:-1]) <= FEW_TOKENS)


def needs_gradient(x: Tensor, members: Sequence[FactorTensors]) -> bool:
    """Whether there may be a backward pass through the outputs for x."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for member in members for p in member.factor_parameters())


class JoinedCodes:
    """The joined codes of a group's members.

    They are joined at the first call that could use them, also by a call with many tokens: a prompt precedes what is
    generated, perhaps by a compiled program. Each parameter becomes a view of its rows; names, shapes and values stay,
    so that saving is as before. Moving or replacing a parameter later undoes the joining.
    """

    def __init__(self, members: Sequence[FactorTensors]) -> None:
        self._members = tuple(members)
        self._matrix: Packed | None = None
        self._pending = True

    def pays(self, x: Tensor) -> bool:
        """Whether one product with joined codes is faster for x, and allowed: no gradient is needed."""
        return x.device.type in JOINED_ON and not needs_gradient(x, self._members)

    def for_input(self, x: Tensor) -> Packed | None:
        """The codes of all members as one matrix, if they lie so and one product with them pays for x.

        Args:
            x: (…, d_in).

        Returns:
            stored tensors by role, or None.
        """
        if not self.pays(x):
            return None
        if self._pending and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._pending = False
            self.join()
        return self._matrix if few_tokens(x) and self._still_joined(x.device) else None

    def all_on(self, device: torch.device) -> bool:
        """Whether the dictionary and the codes of all members lie on one device."""
        codes = (member.code_tensor("values").device for member in self._members)
        return self._members[0].dictionary_device() == device and all(found == device for found in codes)

    def join(self) -> bool:
        """Move the members' codes into one storage; each parameter becomes a view of its rows.

        Returns:
            False if the members lie on different devices or hold no data; nothing is changed then.
        """
        owner = self._members[0]
        packed = [member.packed_codes() for member in self._members]
        if len({tensor.device for part in packed for tensor in part.values()} | {owner.dictionary_device()}) > 1:
            return False
        if packed[0]["values"].device.type == "meta":
            return False
        with torch.inference_mode(False), torch.no_grad():
            matrix = {role: torch.cat([part[role].detach() for part in packed]) for role in packed[0]}
            for role, tensor in matrix.items():
                rows = torch.split(tensor, list(owner.group.d_out))
                for part, view in zip(packed, rows, strict=True):
                    part[role].data = view
        self._matrix = matrix
        return True

    def _still_joined(self, device: torch.device) -> bool:
        """Whether the members' codes still are the rows of the joined matrix, and all lies on one device."""
        if self._matrix is None or self._members[0].dictionary_device() != device:
            return False
        for role, tensor in self._matrix.items():
            address, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
            for member in self._members:
                part = member.code_tensor(role)
                if part.data_ptr() != address or part.dtype != tensor.dtype or part.device != device:
                    self._matrix = None  # moved or replaced; this also frees the storage
                    return False
                address += member.out_features * step
        return True

    def drop(self) -> None:
        """Forget the joined matrix; the next call that could use it joins the codes again."""
        self._matrix, self._pending = None, True

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose parameters have storages of their own."""
        return {"_members": self._members, "_matrix": None, "_pending": True}
