"""Block-local refinement: tune a compressed decoder layer until its output is that of the original one.

After all groups of a layer are factorised, their values, dictionaries and scales, and the layer's norms and biases, are
tuned by Adam: inputs from the compressed prefix, targets from the original model's own stream (AA-SVD's second step;
here masks are fixed and integers rounded straight-through). One layer at a time; nothing flows through the whole model.

A part of the sequences is never trained on. The parameters that are best on it are kept, the unrefined ones among the
candidates, so a layer cannot become worse on text that the tuning has not seen.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cospadi.engine.streams import REMEDY, Streams
from cospadi.engine.tunable import Knob, TunableGroup, knob, straight_through
from cospadi.format import GroupSpec
from cospadi.model_view import guard_memory
from cospadi.recipe import Refine

FIRST_RATE = 3e-3
RATE_FACTOR = 3.0
MOST_FACTORS = 3
EVALUATIONS = 10
WARM_UP = 0.05


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

    def state(self) -> list[Tensor]:
        """A copy of everything that is tuned."""
        return [k.tensor.detach().clone() for k in self.knobs]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Put a copy back."""
        for k, tensor in zip(self.knobs, state, strict=True):
            k.tensor.copy_(tensor)


@dataclass
class _Data:
    """Inputs of the compressed stream, targets of the original one, and which sequences serve what."""

    inputs: Tensor
    targets: Tensor
    trained: Tensor
    held_out: Tensor
    energy: float
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # What follows a layer normalises every token: its error counts as a share of its own size. Without that, the
        # few tokens of enormous norm that many models have would be all that is fitted.
        size = self.targets.float().square().mean(-1)
        self.weight = size.mean() / (size + 1e-3 * size.mean())


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
    with guard_memory(f"refining decoder layer {index}", REMEDY), _deterministic(streams.device):
        block = Block(streams, index, groups, dtype)
        data = _split(streams, targets, options, seed)
        tuner = _Tuner(block, data, options, seed)
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


def _split(streams: Streams, targets: Tensor, options: Refine, seed: int) -> _Data:
    count = len(targets)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(options.held_out * count)), count - 1) if count > 1 else 0
    data = _Data(streams.compressed, targets, order[held:].sort().values, order[:held].sort().values, 1.0)
    added = (targets.float() - streams.original.float()).square().mean(-1) * data.weight
    data.energy = float(added.double().mean()) or 1.0
    return data


class _Tuner:
    """Finds a learning rate, then tunes; keeps what is best on the held-out sequences."""

    def __init__(self, block: Block, data: _Data, options: Refine, seed: int) -> None:
        self.block, self.data, self.options, self.seed = block, data, options, seed
        self.batch = max(1, min(options.batch, len(data.trained)))
        self.start = self.best_state = block.state()
        self.before = self.best = math.inf
        self.steps = 0
        for size in {self.batch, *(len(part) for part in torch.split(data.held_out, self.batch))}:
            block.streams.replay.prepare(block.streams.ids[:size])

    def tune(self) -> dict[str, Any]:
        """Everything; the block is left with the best parameters.

        Returns:
            numbers for the report.
        """
        rate = None
        if len(self.data.held_out):
            self.before = self._evaluate()
            rate = self._find_rate()
            if rate is not None:
                self._run(rate, self.options.steps)
            self.block.restore(self.best_state)
        found = {"held_out_before": self.before, "held_out_after": self.best} if math.isfinite(self.best) else {}
        return found | {"rate": rate, "steps": self.steps}

    def _find_rate(self) -> float | None:
        """The best of a ladder of learning rates by short runs, each from the start; None if all do harm."""
        length = min(self.options.steps, max(EVALUATIONS, round(self.options.steps * self.options.probe)))
        found = {0: self._run(FIRST_RATE, length)}
        for direction in (1, -1):
            power = direction
            while abs(power) <= MOST_FACTORS:
                found[power] = self._run(FIRST_RATE * RATE_FACTOR**power, length)
                if not found[power] < found[power - direction]:
                    break
                power += direction
            if found[direction] < found[0]:
                break
        power = min(found, key=lambda key: found[key])
        return FIRST_RATE * RATE_FACTOR**power if found[power] < self.before else None

    def _run(self, rate: float, steps: int) -> float:
        """Tune from the start, the learning rate falling as a cosine.

        Returns:
            the least held-out error seen after a step.
        """
        self.block.restore(self.start)
        knobs = [k for k in self.block.knobs if k.unit > 0]
        optimiser = torch.optim.Adam([{"params": [k.tensor], "lr": rate * k.unit} for k in knobs], betas=(0.9, 0.95))
        warm = max(1, round(WARM_UP * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda t: min(1.0, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, t / steps)))
        )
        every = max(1, -(-steps // EVALUATIONS))
        least, since = math.inf, 0
        for number, chosen in zip(range(1, steps + 1), self._order(), strict=False):
            optimiser.zero_grad(set_to_none=True)
            self._loss(chosen, self.block.tensors(), grad=True).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            self.steps += 1
            if number % every and number != steps:
                continue
            error = self._evaluate()
            since = 0 if error < least else since + 1
            least = min(least, error)
            if not math.isfinite(error) or since > self.options.patience:
                break
        return least

    def _order(self) -> Iterator[Tensor]:
        """Sequences to train on, batch by batch, without end; the same in every run."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            shuffled = self.data.trained[torch.randperm(len(self.data.trained), generator=generator)]
            yield from (part for part in torch.split(shuffled, self.batch) if len(part) == self.batch)

    def _loss(self, chosen: Tensor, tensors: Mapping[str, Tensor], *, grad: bool = False) -> Tensor:
        streams, data = self.block.streams, self.data
        out = streams.replay.layer_with(self.block.index, data.inputs[chosen], tensors, grad=grad)
        missed = (out.float() - data.targets[chosen].to(out.device).float()).square().mean(-1)
        return (missed * data.weight[chosen].to(out.device)).mean() / data.energy

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Error on the held-out sequences; remembers the parameters if they are the best so far."""
        tensors = self.block.tensors()
        parts = torch.split(self.data.held_out, self.batch)
        error = sum(float(self._loss(part, tensors)) * len(part) for part in parts) / len(self.data.held_out)
        if error < self.best:
            self.best, self.best_state = error, self.block.state()
        return error


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """The same gradients in every run: of the attention kernels, only those whose backward pass adds up in order."""
    if device.type != "cuda":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
