"""The predicted loss of every candidate of every group: trials, measured sensitivity, and curves between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.engine.allocate.candidates import Curve, Task, Trial, error_curve, loss_curve, task_of
from cospadi.engine.allocate.sensitivity import SensitivityMeter, probe_ids
from cospadi.engine.allocate.trials import Trier
from cospadi.engine.context import RunContext
from cospadi.engine.plan.plan import PlannedGroup
from cospadi.format import GroupShape, GroupSpec, Spec
from cospadi.methods.representation import Representation
from cospadi.model_view import LinearGroup

STEPS_PER_OCTAVE = 8
REACH_DOWN, REACH_UP = 1.4, 2.5
"""A group may get this many times less or more than the share that all together keep. Below the smallest size at which
the loss is measured (`MEASURED`) it would be extrapolated. docs/benchmarks.md (Design choices) has a reach of 3."""
FAR_DOWN = 3.0
"""The same where losses are errors, which are not extrapolated."""
MEASURED = (1.0, 0.55)
"""Sizes, as shares of the target, at which the loss of each piece is measured: at the target, and well below it."""
MOST_COMBINATIONS = 256
"""Combinations of the pieces of a group that are handed to the knapsack."""


def shares(keep: float, down: float) -> list[float]:
    """Shares of bytes to consider for a group when all together keep `keep`: from a `down`-th of it, below 1."""
    grid, share = [], keep / down
    while share < min(keep * REACH_UP, 1):
        grid.append(share)
        share *= 2 ** (1 / STEPS_PER_OCTAVE)
    fine = [keep + (1 - keep) * i / 8 for i in range(1, 8)] if keep > 0.5 else []
    return sorted({keep, *grid, *fine})


@dataclass(frozen=True)
class Option:
    """A candidate of a group and its predicted loss.

    Attributes:
        parts: what is stored: one spec for the whole group, or one for each of its pieces, and their representations.
        loss: predicted.
    """

    parts: tuple[tuple[Representation, Spec], ...]
    loss: float

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(spec.bytes for _, spec in self.parts)


@dataclass
class Profile:
    """What is known of a group.

    Attributes:
        shape: of the group.
        relative: losses are errors of the weights instead of their outputs.
        pieces: the layers that may choose for themselves; the group itself if they may not.
        offered: representations that were tried, by number.
        seen: their trials.
        losses: of each piece, pairs of squared error and measured divergence.
        options: all candidates, once known.
    """

    shape: GroupShape
    relative: bool
    pieces: tuple[GroupShape, ...]
    offered: dict[int, Representation] = field(default_factory=dict)
    seen: dict[int, list[Trial]] = field(default_factory=dict)
    losses: list[list[tuple[float, float]]] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    _curves: dict[int, tuple[Curve, ...]] = field(default_factory=dict)
    _loss_curves: list[Curve] = field(default_factory=list)

    def settle(self, grid: Sequence[float]) -> None:
        """Turn what was solved and measured into candidates at all shares of the grid."""
        for index, trials in self.seen.items():
            self._curves[index] = tuple(
                error_curve(
                    [(t.spec.bytes, t.relative if self.relative else t.missed[piece]) for t in trials],
                    self.shape.dense_bytes,
                )
                for piece in range(len(self.pieces))
            )
        self._loss_curves = [loss_curve(points) for points in self.losses if points]
        whole: list[Option] = []
        singles: list[list[Option]] = [[] for _ in self.pieces]
        for index, trials in self.seen.items():
            item = self.offered[index]
            specs = {spec.bytes: spec for spec in item.specs(self.shape, grid)}
            specs |= {trial.spec.bytes: trial.spec for trial in trials}
            for _, spec in sorted(specs.items()):
                if item.each and len(self.pieces) > 1:
                    for piece in range(len(self.pieces)):
                        part = item, piece_spec(spec, piece)
                        singles[piece].append(Option((part,), self._piece_loss(index, spec, piece)))
                else:
                    whole.append(Option(((item, spec),), self._loss(index, spec)))
        self.options = whole + (combined(singles) if all(singles) else [])

    def predict(self, item: Representation, spec: Spec) -> float:
        """Predicted loss of any spec of the whole group of a representation that was tried."""
        return self._loss(next(i for i, known in self.offered.items() if known is item), spec)

    def _loss(self, index: int, spec: Spec) -> float:
        return sum(self._piece_loss(index, spec, piece) for piece in range(len(self.pieces)))

    def _piece_loss(self, index: int, spec: Spec, piece: int) -> float:
        error = self._curves[index][piece](spec.bytes)
        return self._loss_curves[piece](error) if self._loss_curves else error


def combined(singles: Sequence[Sequence[Option]], most: int = MOST_COMBINATIONS) -> list[Option]:
    """One option of each piece, losses added up; combinations that others beat in bytes and loss are left out.

    Args:
        singles: options of every piece.
        most: combinations that stay, the smallest and the largest among them.
    """
    found = [Option((), 0.0)]
    for options in singles:
        sums = (Option(a.parts + b.parts, a.loss + b.loss) for a in found for b in options)
        found, least = [], inf
        for option in sorted(sums, key=lambda o: (o.bytes, o.loss)):
            if option.loss < least:
                found.append(option)
                least = option.loss
        if len(found) > most:
            found = [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
    return found


def piece_spec(spec: GroupSpec, piece: int) -> GroupSpec:
    """What one layer of a group without a dictionary stores."""
    return replace(
        spec,
        modules=(spec.modules[piece],),
        d_out=(spec.d_out[piece],),
        codes=spec.module_codes(piece),
        dictionary=None,
    )


def profile(
    context: RunContext,
    groups: Sequence[PlannedGroup],
    offered: Sequence[Representation],
    keep: float,
    *,
    measure: bool,
    relative: bool,
) -> list[Profile]:
    """Solve trials of every group, measure the sensitivity of some, and predict the loss of every candidate.

    Args:
        context: of the run.
        groups: each with one input.
        offered: representations that may be chosen.
        keep: share of bytes that all groups together keep.
        measure: whether losses are measured divergences; otherwise they are errors.
        relative: errors are relative errors of the weights, not squared errors of the outputs.

    Returns:
        profiles in the order of the groups.
    """
    grid = shares(keep, FAR_DOWN if relative else REACH_DOWN)
    trier = Trier(offered, grid, keep)
    if roomy(trier.active, groups, grid, keep):
        measure = False  # all can have the most there is: sensitivity decides nothing
    view = context.view
    found = [Profile(group.spec.shape, relative, _pieces(group, offered)) for group in groups]
    measured: list[tuple[int, int, float]] = []
    with ExitStack() as stack:
        meter = stack.enter_context(SensitivityMeter(view, probe_ids(context.ids), context.device)) if measure else None
        done = 0
        for layer in range(len(view.layers)):
            variants: list[dict[str, Tensor]] = []
            loaded: dict[LinearGroup, Statistics] = {}
            for index, group in enumerate(groups):
                if group.layer != layer:
                    continue
                context.progress("plan", done, len(groups), group.spec.name)
                if group.source not in loaded:
                    loaded = {group.source: context.read(group.source)}
                item, inputs = found[index], loaded[group.source]
                task = task_of(context, group.spec, inputs, [sum(piece.d_out) for piece in item.pieces])
                item.offered, item.seen, solved = trier.trials(item.shape, task)
                if meter is not None:
                    item.losses = [[] for _ in item.pieces]
                    target = int(keep * group.spec.dense_bytes)
                    for piece, missed, weight in telling(solved, task, target):
                        shape = item.pieces[piece]
                        parts = torch.split(weight, list(shape.d_out), 1)
                        variants.append(dict(zip(shape.modules, parts, strict=True)))
                        measured.append((index, piece, missed))
                done += 1
            if meter is not None:
                meter.layer(layer, list(variants))
        if meter is not None:
            for (index, piece, missed), divergence in zip(measured, meter.divergences(), strict=True):
                found[index].losses[piece].append((missed, divergence))
    for item in found:
        item.settle(grid)
    context.progress("plan", len(groups), len(groups))
    return found


def roomy(
    offered: Sequence[Representation], groups: Sequence[PlannedGroup], grid: Sequence[float], keep: float
) -> bool:
    """Whether sizes do not depend on the budget and the largest of all groups fit together.

    Args:
        offered: representations whose sizes come near the budget.
        groups: each with one input.
        grid: shares of bytes to consider.
        keep: share that all groups together keep.
    """
    if not offered or not all(item.fixed for item in offered):
        return False
    room = keep * sum(group.spec.dense_bytes for group in groups)
    for group in groups:
        sizes = [spec.bytes for item in offered for spec in item.specs(group.spec.shape, grid)]
        room -= max(sizes, default=group.spec.dense_bytes)
    return room >= 0


def _pieces(group: PlannedGroup, offered: Sequence[Representation]) -> tuple[GroupShape, ...]:
    spec = group.spec.shape
    if not any(item.each for item in offered):
        return (spec,)
    return tuple(GroupShape((name,), spec.d_in, (d,)) for name, d in zip(spec.modules, spec.d_out, strict=True))


def telling(solved: Sequence[tuple[Trial, Tensor]], task: Task, target: int) -> list[tuple[int, float, Tensor]]:
    """What to replace each piece with to measure how sensitive the model is to its errors.

    Of the trials that no other one beats in bytes and error, those nearest to the sizes `MEASURED`. Where there is but
    one, its error is taken once more, twice as large.

    Args:
        solved: trials and the weights they stand for.
        task: the group.
        target: bytes.

    Returns:
        piece, squared error, weight (d_in, columns of the piece) on the CPU; twice for every piece.
    """
    best: list[tuple[Trial, Tensor]] = []
    for trial, weight in sorted(solved, key=lambda pair: (pair[0].spec.bytes, pair[0].total)):
        if not best or trial.total < best[-1][0].total:
            best.append((trial, weight))
    chosen: list[int] = []
    for share in MEASURED:
        free = [i for i in range(len(best)) if i not in chosen]
        if free:
            chosen.append(min(free, key=lambda i: abs(best[i][0].spec.bytes - share * target)))
    original = torch.split(task.weight.float().cpu(), list(task.widths), 1)
    found = []
    for index in chosen:
        trial, weight = best[index]
        for piece, part in enumerate(torch.split(weight, list(task.widths), 1)):
            found.append((piece, trial.missed[piece], part))
            if len(chosen) == 1:
                found.append((piece, 4 * trial.missed[piece], 2 * part - original[piece]))
    return found
