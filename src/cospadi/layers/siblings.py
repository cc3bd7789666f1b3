"""What layers with one input and one dictionary share: the product x D, or on a GPU the whole group's outputs.

The first of the layers owns the dictionary. Without gradients, for a few tokens on a GPU, one product with codes that
lie behind each other in one storage (:meth:`Siblings.join`) gives the outputs of all siblings; otherwise x D is
computed once, and each sibling multiplies its own codes. In eager mode the shared result is remembered until every
sibling has used it. Programs of `torch.compile`, and without Dynamo of `torch.export`, are traced so that they do the
same; in strict exports and within `torch.cond` and its like every sibling asks for x D, and with gradients too, where
PyTorch merges the equal calls of a program that has a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from cospadi.format import Packed
from cospadi.kernels import is_traced

if TYPE_CHECKING:
    from cospadi.layers.factored_linear import FactoredLinear

FEW_TOKENS = 16
"""Up to this many rows of x the outputs are computed together; with more, launches no longer matter."""

JOINED_ON = ("cuda",)
"""Devices where a launch costs so much that joining the codes pays."""

State = tuple[Any, ...]


@dataclass
class _Traced:
    """The shared result within a program that is being made."""

    x: Tensor
    cast: torch.dtype | None
    result: Tensor
    finished: bool  # the outputs of all members side by side, or their coordinates
    waiting: set[int]


@dataclass
class _Memo:
    """The shared result of one input, and all that must still be as it was for it to hold."""

    x: Tensor  # held, hence its identity cannot pass to another tensor
    ambient: State
    dictionary: State | None
    coordinates: Tensor | None  # either these …
    outputs: tuple[Tensor, ...]  # … or these, one per member, which also depend on
    codes: tuple[State | None, ...]
    waiting: set[int]


def _cast(x: Tensor) -> torch.dtype | None:
    """To what autocast casts, where it is on."""
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)  # Dynamo cannot ask where autocast is available at all
    return torch.get_autocast_dtype(kind) if casts else None


def _ambient(x: Tensor) -> State:
    """Version of the input and the modes that change a product's value, dtype or graph."""
    return x._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _cast(x)


def _may_note() -> bool:
    """Whether a program that is being made may note something outside its tensors, until it is finished.

    Dynamo forbids it within `torch.cond` and its like, and strict exports warn of it.
    """
    if not torch.compiler.is_dynamo_compiling():
        return True
    # not `is_exporting`, which in PyTorch 2.11 says yes to `torch.compile` too
    return not getattr(torch.compiler, "_is_exporting_flag", False) and _at_top_level()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _at_top_level() -> bool:
    """Whether Dynamo is not within an operator that takes functions; no, where it cannot be told."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is None
    except (ImportError, AttributeError):
        return False


def _few(x: Tensor) -> bool:
    return guard_or_false(prod(x.shape[:-1]) <= FEW_TOKENS)  # a compiler may not know


class Siblings:
    """The members of a group, the first being the owner of the dictionary.

    A plain object, not a module: a sibling reaches the owner without holding its parameters a second time.
    """

    def __init__(self, members: Sequence[FactoredLinear]) -> None:
        self.members = tuple(members)
        self._memo: _Memo | None = None
        self._traced: _Traced | None = None
        self._joined: Packed | None = None
        self._join_pending = True

    @property
    def owner(self) -> FactoredLinear:
        """The member that holds the dictionary."""
        return self.members[0]

    def shared(self, x: Tensor, index: int) -> tuple[Tensor, bool]:
        """What one member gets from the group.

        A remembered result is served once to each member, and only if `x` is the same tensor, unchanged, under the
        same autograd and autocast modes, and neither dictionary nor codes have changed. In a program that is being made
        changes cannot be seen; groups are made of layers that were seen to read one unchanged tensor.

        Args:
            x: (…, d_in).
            index: which member asks.

        Returns:
            the member's output without bias (…, d_out) and True, or the coordinates (…, atoms) and False; on the
            device of `x`.
        """
        if is_traced():
            return self._shared_in_program(x, index)
        self._traced = None  # of a program that was not finished
        if x.is_inference():  # has no version: a change would not be noticed
            return self._coordinates(x), False
        memo, ambient = self._memo, _ambient(x)
        fresh = memo is not None and memo.x is x and memo.ambient == ambient and index in memo.waiting
        if memo is None or not fresh or not self._holds(memo, index):
            self._memo = None  # frees the old result before the new one is made
            memo = self._compute(x, ambient)
        memo.waiting.discard(index)
        self._memo = memo if memo.waiting else None
        if memo.coordinates is not None:
            return memo.coordinates, False
        return memo.outputs[index].contiguous(), True

    def _shared_in_program(self, x: Tensor, index: int) -> tuple[Tensor, bool]:
        """As :meth:`shared`, by identity alone. A region that is computed again backwards may leave nothing behind."""
        if self._needs_gradient(x) or not _may_note():
            return self._coordinates(x), False
        held = self._traced
        if held is None or held.x is not x or held.cast != _cast(x) or index not in held.waiting:
            together = torch.compiler.is_dynamo_compiling() and self._joinable(x) and self._lies_on(x.device)
            finished = together and _few(x)
            result = self.owner.all_outputs(x, self.members) if finished else self._coordinates(x)
            held = _Traced(x, _cast(x), result, finished, set(range(len(self.members))))
        held.waiting.discard(index)
        self._traced = held if held.waiting else None
        if held.finished:
            return torch.split(held.result, list(self.owner.group.d_out), -1)[index].contiguous(), True
        return held.result, False

    def _holds(self, memo: _Memo, index: int) -> bool:
        if memo.outputs and self.members[index].codes_state() != memo.codes[index]:
            return False
        if memo.dictionary is None:
            return True
        now = self.owner.dictionary_state()
        return now is None or now == memo.dictionary  # None: offloaded since, hence not changed

    def _compute(self, x: Tensor, ambient: State) -> _Memo:
        waiting = set(range(len(self.members)))
        joined = self._joined_codes(x)
        if joined is not None:
            outputs = torch.split(self.owner.group_output(x, joined), list(self.owner.group.d_out), -1)
            codes = tuple(member.codes_state() for member in self.members)
            return _Memo(x, ambient, self.owner.dictionary_state(), None, outputs, codes, waiting)
        coordinates = self._coordinates(x)
        if coordinates is x:  # identity dictionary: nothing to remember
            return _Memo(x, ambient, None, x, (), (), set())
        # the state after the product: the owner's hooks may only now have brought its dictionary
        return _Memo(x, ambient, self.owner.dictionary_state(), coordinates, (), (), waiting)

    def _coordinates(self, x: Tensor) -> Tensor:
        owner = self.owner
        if owner.dictionary_spec is None:
            return x
        where = owner.dictionary_device()
        if where.type == "meta" and x.device.type != "meta":
            # offloaded: a call runs the hooks that bring its parameters, whichever device they execute on
            coordinates: Tensor = owner(x, coordinates_only=True)
        elif where != x.device:
            coordinates = owner.project(x.to(where))
        else:
            return owner.project(x)
        return coordinates.to(x.device)

    def _joined_codes(self, x: Tensor) -> Packed | None:
        """The codes of all members as one matrix, where they lie so and one product with them is of use."""
        if not self._joinable(x):
            return None
        # also before many tokens: a prompt goes before what is generated, perhaps by a compiled program
        if self._join_pending and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._join_pending = False
            self.join()
        return self._joined if _few(x) and self._lies_joined(x.device) else None

    def _joinable(self, x: Tensor) -> bool:
        return x.device.type in JOINED_ON and not self._needs_gradient(x)

    def _lies_on(self, device: torch.device) -> bool:
        codes = (member.code_tensor("values").device for member in self.members)
        return self.owner.dictionary_device() == device and all(found == device for found in codes)

    def _needs_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for m in self.members for p in m.factor_parameters())

    def join(self) -> bool:
        """Lay the members' codes behind each other in one storage; each parameter becomes a view of its rows.

        Names, shapes and values of the parameters stay, so that saving is as before. Moving or replacing a parameter
        later undoes it.

        Returns:
            False if the members lie on different devices or have no data; nothing is changed then.
        """
        packed = [member.packed_codes() for member in self.members]
        if len({tensor.device for part in packed for tensor in part.values()} | {self.owner.dictionary_device()}) > 1:
            return False
        if packed[0]["values"].device.type == "meta":
            return False
        with torch.inference_mode(False), torch.no_grad():
            joined = {role: torch.cat([part[role].detach() for part in packed]) for role in packed[0]}
            for role, tensor in joined.items():
                rows = torch.split(tensor, list(self.owner.group.d_out))
                for part, view in zip(packed, rows, strict=True):
                    part[role].data = view
        self._joined = joined
        return True

    def _lies_joined(self, device: torch.device) -> bool:
        """Whether the members' codes still are the rows of the joined matrix, and all lies on one device."""
        if self._joined is None or self.owner.dictionary_device() != device:
            return False
        for role, tensor in self._joined.items():
            address, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
            for member in self.members:
                part = member.code_tensor(role)
                if part.data_ptr() != address or part.dtype != tensor.dtype or part.device != device:
                    self._joined = None  # moved or replaced; frees the storage too
                    return False
                address += member.out_features * step
        return True

    def placed_anew(self) -> None:
        """Note that parameters have moved, as by ``module.to``."""
        self._memo = self._joined = self._traced = None
        self._join_pending = True

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what is remembered or joined."""
        return {"members": self.members, "_memo": None, "_traced": None, "_joined": None, "_join_pending": True}
