"""Programs that are being traced by `torch.compile` or `torch.export`: siblings share within the program.

Without gradients and for a few tokens on a GPU, one operation computes the outputs of the whole group; otherwise x D is
computed once and each sibling multiplies its own codes. In strict exports, and within `torch.cond` and its like, every
sibling computes x D; with gradients too, where PyTorch merges the equal calls of a program that has a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.kernels import _torch_private as hooks
from cospadi.kernels import factored_group, factored_linear
from cospadi.layers.factor_tensors import FactorTensors
from cospadi.layers.siblings.joined import JoinedCodes
from cospadi.layers.siblings.memo import autocast_dtype, coordinates, few_tokens, needs_gradient


@dataclass
class _Shared:
    """The shared result of one input within one program."""

    x: Tensor
    cast: torch.dtype | None
    result: Tensor
    finished: bool  # the outputs of all members side by side, or their coordinates
    waiting: set[int]


def _may_note() -> bool:
    """Whether tracing may leave a note outside the program's tensors until the program is finished.

    Dynamo forbids it within `torch.cond` and its like, and strict exports warn of it.
    """
    return not torch.compiler.is_dynamo_compiling() or (not hooks.is_exporting() and hooks.at_top_level())


class Traced:
    """Outputs of a group's members in a program that is being traced.

    Changes of tensors cannot be seen there, so a result is shared by the identity of x alone: groups are made of layers
    that were seen to read one unchanged tensor. A region that is recomputed in the backward pass may leave no note.
    """

    def __init__(self, members: Sequence[FactorTensors], joined: JoinedCodes) -> None:
        self._members, self._joined = tuple(members), joined
        self.held: _Shared | None = None

    def output(self, x: Tensor, index: int) -> Tensor:
        """Output of one member, without bias.

        Args:
            x: (…, d_in).
            index: of the member.

        Returns:
            (…, d_out), on the device of x.
        """
        members, owner = self._members, self._members[0]
        member = members[index]
        if needs_gradient(x, members) or not _may_note():
            hidden = coordinates(owner, x)
            return factored_linear(hidden, None, None, member.packed_codes(), member.codes_spec)
        held, cast = self.held, autocast_dtype(x)
        if held is None or held.x is not x or held.cast != cast or index not in held.waiting:
            joinable = torch.compiler.is_dynamo_compiling() and self._joined.device() == x.device
            finished = joinable and few_tokens(x)
            if finished:
                codes = [member.packed_codes() for member in members]
                z = owner.rotated(x)
                result = factored_group(z, owner.own_dictionary(), owner.dictionary_spec, codes, owner.group.codes)
            else:
                result = coordinates(owner, x)
            held = _Shared(x, cast, result, finished, set(range(len(members))))
        held.waiting.discard(index)
        self.held = held if held.waiting else None
        if held.finished:
            return torch.split(held.result, list(owner.group.d_out), -1)[index].contiguous()
        return factored_linear(held.result, None, None, member.packed_codes(), member.codes_spec)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is noted."""
        return {"_members": self._members, "_joined": self._joined, "held": None}
