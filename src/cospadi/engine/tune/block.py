"""Block-local refinement: tune a compressed decoder layer until its output is that of the original one.

After all groups of a layer are factorised, their values, dictionaries and scales, and the layer's norms and biases, are
tuned by Adam: inputs from the compressed prefix, targets from the original model's own stream (AA-SVD's second step;
here masks are fixed and integers rounded straight-through). One layer at a time; nothing flows through the whole model.

A part of the sequences is never trained on. The parameters that are best on it are kept, the unrefined ones among the
candidates, so a layer cannot become worse on text that the tuning has not seen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.engine.tune.streams import REMEDY, Streams
from cospadi.engine.tune.tunable import Knob, TunableGroup, knob, straight_through
from cospadi.engine.tune.tuner import Schedule, Tuner, split_sequences
from cospadi.format import GroupSpec
from cospadi.recipe import Refine
from cospadi.runtime.devices import deterministic
from cospadi.runtime.memory import guard_memory

FIRST_RATE = 3e-3


@dataclass(frozen=True)
class Refined:
    """What refinement left.

    Attributes:
        packed: each group's packed tensors, in the order given.
        others: norms and biases by name within the layer, in their own dtype, on the CPU.
        info: ``held_out_before``, ``held_out_after`` (the loss on held-out sequences; absent where there were none),
            ``rate`` (None: no learning rate helped), ``steps``, ``seconds``.
    """

    packed: list[dict[str, Tensor]]
    others: dict[str, Tensor]
    info: dict[str, Any]


class Block:
    """One decoder layer as a function of what is tuned.

    Args:
        streams: both streams before the layer.
        index: of the layer.
        groups: specs and packed tensors of all its groups.
        dtype: 16-bit float of the stored tensors.
    """

    def __init__(
        self, streams: Streams, index: int, groups: Sequence[tuple[GroupSpec, dict[str, Tensor]]], dtype: torch.dtype
    ) -> None:
        self.streams, self.index = streams, index
        self.groups = [TunableGroup(spec, tensors, dtype, streams.device) for spec, tensors in groups]
        layer = streams.replay.fetch(index)
        small = {name: p.detach() for name, p in layer.named_parameters() if p.ndim == 1 and p.is_floating_point()}
        self.own = small
        # a tensor of zeros has no size to measure steps by, and was not meant to do anything
        self.others = {name: knob(p) for name, p in small.items() if bool(p.any())}

    @property
    def knobs(self) -> list[Knob]:
        """All that is tuned."""
        return [k for group in self.groups for k in group.knobs] + list(self.others.values())

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by name within the layer, as the stored ones compute, in the layer's dtype."""
        out: dict[str, Tensor] = {}
        for group in self.groups:
            for name, weight in zip(group.spec.modules, group.weights(), strict=True):
                target = self.streams.view.weight(name).dtype
                out[f"{self.streams.relative(self.index, name)}.weight"] = weight.to(target)
        for name, one in self.others.items():
            dtype = self.own[name].dtype
            out[name] = straight_through(one.tensor, one.tensor.detach().to(dtype).float()).to(dtype)
        return out


class _Output:
    """The problem: the original layer's output, from the compressed stream."""

    def __init__(self, block: Block, targets: Tensor) -> None:
        self.block, self.targets = block, targets
        self.knobs = block.knobs
        # What follows a layer normalises every token: its error counts as a share of its own size. Without that, the
        # few tokens of enormous norm that many models have would be all that is fitted.
        size = targets.float().square().mean(-1)
        self.weight = size.mean() / (size + 1e-3 * size.mean())
        added = (targets.float() - block.streams.original.float()).square().mean(-1) * self.weight
        self.energy = float(added.double().mean()) or 1.0

    def backward(self, chosen: Tensor) -> None:
        """Gradients of the mean squared error of some sequences."""
        self._loss(chosen, grad=True).backward()  # type: ignore[no-untyped-call]

    def error(self, chosen: Tensor) -> float:
        """That error, as a share of what the original layer adds to the stream."""
        return float(self._loss(chosen))

    def _loss(self, chosen: Tensor, *, grad: bool = False) -> Tensor:
        block = self.block
        inputs = block.streams.compressed[chosen]
        out = block.streams.replay.layer_with(block.index, inputs, block.tensors(), grad=grad)
        missed = (out.float() - self.targets[chosen].to(out.device).float()).square().mean(-1)
        return (missed * self.weight[chosen].to(out.device)).mean() / self.energy


def refine_layer(
    streams: Streams,
    index: int,
    groups: Sequence[tuple[GroupSpec, dict[str, Tensor]]],
    targets: Tensor,
    options: Refine,
    *,
    seed: int,
    dtype: torch.dtype,
) -> Refined:
    """Tune one layer.

    Args:
        streams: both streams before the layer, whose modules still hold the original weights.
        index: of the layer.
        groups: specs and packed tensors of all its groups.
        targets: the original layer's output on the original stream (sequences, length, width).
        options: steps, batch, share that is held out.
        seed: of the split and of the order of sequences.
        dtype: 16-bit float of the stored tensors.
    """
    begun = time.perf_counter()
    with guard_memory(f"refining decoder layer {index}", REMEDY), deterministic(streams.device):
        block = Block(streams, index, groups, dtype)
        trained, held_out = split_sequences(len(targets), options.held_out, seed)
        schedule = Schedule(options.steps, options.batch, options.probe, options.patience, FIRST_RATE)
        tuner = Tuner(_Output(block, targets), trained, held_out, schedule, seed)
        for size in {tuner.batch, *(len(part) for part in torch.split(held_out, tuner.batch))}:
            streams.replay.prepare(streams.ids[:size])
        info = tuner.tune()
        packed = [group.packed() for group in block.groups]
        others = {name: block.tensors()[name].detach().cpu() for name in block.others}
    return Refined(packed, others, info | {"seconds": time.perf_counter() - begun})


def block_error(streams: Streams, index: int, tensors: Mapping[str, Tensor], targets: Tensor) -> float:
    """Squared error of a compressed layer's output over the energy of what the original layer adds to the stream.

    Args:
        streams: both streams before the layer.
        index: of the layer.
        tensors: its compressed weights by name within the layer.
        targets: the original layer's output.
    """
    missed = (
        (streams.run(index, streams.compressed, tensors).float() - targets.float()).square().sum(dtype=torch.float64)
    )
    added = (targets.float() - streams.original.float()).square().sum(dtype=torch.float64)
    return float(missed / added) if added else 0.0
