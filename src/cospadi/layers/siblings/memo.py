"""Eager mode: the product x D, or the outputs of all siblings, computed once and remembered until all have used it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from cospadi.format import Packed
from cospadi.kernels import _torch_private as hooks
from cospadi.kernels import factored_linear
from cospadi.layers.factor_tensors import FactorTensors, State
from cospadi.layers.siblings import joined

FEW_TOKENS = 16
"""Up to this many rows of x the outputs are computed together; with more, the cost of launches no longer matters."""


def own_product(owner: FactorTensors, x: Tensor) -> Tensor:
    """The coordinates z D (…, atoms) of a layer that holds dictionary and rotation, x on their device."""
    dictionary, z = owner.own_dictionary(), owner.rotated(x)
    if dictionary is None or owner.dictionary_spec is None:
        return z
    return factored_linear(z, None, None, dictionary, owner.dictionary_spec)


def coordinates(owner: FactorTensors, x: Tensor) -> Tensor:
    """The same on the device of x, wherever the dictionary lies; x itself where the codes read it."""
    if owner.reads_x:
        return x
    where = owner.dictionary_device()
    if where == x.device:
        return own_product(owner, x)
    if where.type == "meta" and x.device.type != "meta":
        # offloaded: a call runs the hooks that bring its parameters, whichever device they execute on
        found: Tensor = owner(x, coordinates_only=True)
    else:
        found = own_product(owner, x.to(where))
    return found.to(x.device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts on the device of x; None where it is off."""
    kind = x.device.type
    # Dynamo cannot trace the question on which devices autocast is available at all
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else None


def few_tokens(x: Tensor) -> bool:
    """Whether x (…, d_in) has at most `FEW_TOKENS` rows; False where a compiler does not know."""
    return guard_or_false(prod(x.shape[:-1]) <= FEW_TOKENS)


def needs_gradient(x: Tensor, members: Sequence[FactorTensors]) -> bool:
    """Whether there may be a backward pass through the outputs for x."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for member in members for p in member.factor_parameters())


@dataclass
class _Shared:
    """The shared result for one input, and everything that must be unchanged for it to hold."""

    x: Tensor  # kept alive, hence its identity cannot pass to another tensor
    ambient: State
    dictionary: State | None
    coordinates: Tensor | None  # either these …
    outputs: tuple[Tensor, ...]  # … or these, one per member, which also depend on
    codes: tuple[State | None, ...]
    waiting: set[int]


class Memo:
    """Outputs of a group's members in eager mode.

    A remembered result is served once to each member, and only if x is the same tensor, unchanged, under the same
    autograd and autocast modes, and if neither dictionary nor codes have changed.
    """

    def __init__(self, members: Sequence[FactorTensors], codes: joined.JoinedCodes) -> None:
        self._members, self._joined = tuple(members), codes
        self.held: _Shared | None = None

    def output(self, x: Tensor, index: int) -> Tensor:
        """Output of one member, without bias.

        Args:
            x: (…, d_in).
            index: of the member.

        Returns:
            (…, d_out), on the device of x.
        """
        member = self._members[index]
        if x.is_inference():  # has no version: a change would not be noticed
            hidden = coordinates(self._members[0], x)
            return factored_linear(hidden, None, None, member.packed_codes(), member.codes_spec)
        casts = autocast_dtype(x)
        ambient = (hooks.tensor_version(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts)
        held = self.held
        known = held is not None and held.x is x and held.ambient == ambient and index in held.waiting
        if held is None or not known or not self._unchanged(held, index):
            self.held = None  # frees the old result before the new one is made
            held = self._computed(x, ambient)
        held.waiting.discard(index)
        self.held = held if held.waiting else None
        if held.coordinates is None:
            return held.outputs[index].contiguous()
        return factored_linear(held.coordinates, None, None, member.packed_codes(), member.codes_spec)

    def _unchanged(self, held: _Shared, index: int) -> bool:
        if held.outputs and self._members[index].codes_state() != held.codes[index]:
            return False
        if held.dictionary is None:
            return True
        now = self._members[0].dictionary_state()
        return now is None or now == held.dictionary  # None: offloaded since, hence not changed

    def _computed(self, x: Tensor, ambient: State) -> _Shared:
        owner = self._members[0]
        waiting = set(range(len(self._members)))
        matrix: Packed | None = None
        if x.device.type in joined.JOINED_ON and not needs_gradient(x, self._members):
            self._joined.prepare()
            matrix = self._joined.matrix() if few_tokens(x) else None
        if matrix is not None and matrix["values"].device == x.device:
            z = owner.rotated(x)
            together = factored_linear(z, owner.own_dictionary(), owner.dictionary_spec, matrix, owner.group.codes)
            outputs = torch.split(together, list(owner.group.d_out), -1)
            codes = tuple(member.codes_state() for member in self._members)
            return _Shared(x, ambient, owner.dictionary_state(), None, outputs, codes, waiting)
        hidden = coordinates(owner, x)
        if hidden is x:  # the codes read it: nothing to remember
            return _Shared(x, ambient, None, x, (), (), set())
        # the state after the product: the owner's hooks may only now have brought its dictionary
        return _Shared(x, ambient, owner.dictionary_state(), hidden, (), (), waiting)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is remembered."""
        return {"_members": self._members, "_joined": self._joined, "held": None}
