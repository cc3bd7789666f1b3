"""The codes of all siblings behind each other in one storage, so that one product serves the group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cospadi.format import Packed
from cospadi.layers.factor_tensors import FactorTensors

JOINED_ON = ("cuda",)
"""Device types where a launch costs so much that joining the codes pays."""


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

    def device(self) -> torch.device | None:
        """The device of the dictionary and all codes; None if there are several, or if joining is no use there."""
        where = self._members[0].dictionary_device()
        if where.type not in JOINED_ON or not self._members[0].group.stacked:
            return None
        apart = any(member.code_tensor("values").device != where for member in self._members)
        return None if apart else where

    def prepare(self) -> None:
        """Join the codes at the first call, unless a CUDA graph is being captured."""
        where = self._members[0].dictionary_device().type
        if self._pending and not (where == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._pending = False
            self.join()

    def join(self) -> bool:
        """Move the members' codes into one storage; each parameter becomes a view of its rows.

        Returns:
            False if the members lie on different devices or hold no data, or if their rows do not make one stored
            matrix; nothing is changed then.
        """
        owner = self._members[0]
        if not owner.group.stacked:
            return False
        packed = [member.packed_codes() for member in self._members]
        if len({tensor.device for part in packed for tensor in part.values()} | {owner.dictionary_device()}) > 1:
            return False
        if packed[0]["values"].device.type == "meta":
            return False
        with torch.inference_mode(False), torch.no_grad():
            matrix = {role: torch.cat([part[role].detach() for part in packed]) for role in packed[0]}
            for role, tensor in matrix.items():
                rows = torch.split(tensor, owner.group.lengths(role))
                for part, view in zip(packed, rows, strict=True):
                    part[role].data = view
        self._matrix = matrix
        return True

    def matrix(self) -> Packed | None:
        """The codes of all members as one matrix, by role, on one device with the dictionary.

        None unless the members' codes still are the rows of the joined matrix.
        """
        if self._matrix is None:
            return None
        where = self._matrix["values"].device
        if self._members[0].dictionary_device() != where:
            return None
        for role, tensor in self._matrix.items():
            address, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
            for member in self._members:
                part = member.code_tensor(role)
                if part.data_ptr() != address or part.dtype != tensor.dtype or part.device != where:
                    self._matrix = None  # moved or replaced; this also frees the storage
                    return None
                address += part.shape[0] * step
        return self._matrix

    def drop(self) -> None:
        """Forget the joined matrix; the next call that could use it joins the codes again."""
        self._matrix, self._pending = None, True

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose parameters have storages of their own."""
        return {"_members": self._members, "_matrix": None, "_pending": True}
