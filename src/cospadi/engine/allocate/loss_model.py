"""What every candidate of every group costs the model: trials, measured harm, and curves between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from cospadi.calibration import Statistics, StatisticsStore
from cospadi.engine.allocate.candidates import Curve, Family, Task, Trial, error_curve, harm_curve
from cospadi.engine.allocate.sensitivity import DamageMeter, probe_ids
from cospadi.engine.allocate.trials import Trier
from cospadi.engine.plan.plan import PlannedGroup
from cospadi.format import GroupSpec
from cospadi.methods import GroupShape
from cospadi.model_view import LinearGroup, ModelView
from cospadi.progress import Progress

STEPS_PER_OCTAVE = 8
REACH_DOWN, REACH_UP = 1.4, 2.5
"""A group may get this many times less or more than the share that all together keep. Below the smallest size at which
harm is measured (`MEASURED`) it would be extrapolated. What a reach of 3 did better and worse: docs/methods.md."""
FAR_DOWN = 3.0
"""The same where losses are errors, which are not extrapolated."""
MEASURED = (1.0, 0.55)
"""Sizes, as shares of the target, about which the harm of each piece is measured: at it, and where errors are large."""
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
        parts: what is stored: one spec for the whole group, or one for each of its pieces, and their families.
        loss: predicted.
    """

    parts: tuple[tuple[Family, GroupSpec], ...]
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
        families: those that were tried, by number.
        seen: their trials.
        harm: of each piece, pairs of squared error and measured divergence.
        options: all candidates, once known.
    """

    shape: GroupShape
    relative: bool
    pieces: tuple[GroupShape, ...]
    families: dict[int, Family] = field(default_factory=dict)
    seen: dict[int, list[Trial]] = field(default_factory=dict)
    harm: list[list[tuple[float, float]]] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    _curves: dict[int, tuple[Curve, ...]] = field(default_factory=dict)
    _harm: list[Curve] = field(default_factory=list)

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
        self._harm = [harm_curve(points) for points in self.harm if points]
        whole: list[Option] = []
        singles: list[list[Option]] = [[] for _ in self.pieces]
        for index, trials in self.seen.items():
            family = self.families[index]
            specs = {spec.bytes: spec for spec in family.specs(self.shape, grid)}
            specs |= {trial.spec.bytes: trial.spec for trial in trials}
            for _, spec in sorted(specs.items()):
                if family.each and len(self.pieces) > 1:
                    for piece in range(len(self.pieces)):
                        part = family, piece_spec(spec, piece)
                        singles[piece].append(Option((part,), self._piece_loss(index, spec, piece)))
                else:
                    whole.append(Option(((family, spec),), self._loss(index, spec)))
        self.options = whole + (combined(singles) if all(singles) else [])

    def predict(self, family: Family, spec: GroupSpec) -> float:
        """Predicted loss of any spec of the whole group of a family that was tried."""
        return self._loss(next(i for i, known in self.families.items() if known is family), spec)

    def _loss(self, index: int, spec: GroupSpec) -> float:
        return sum(self._piece_loss(index, spec, piece) for piece in range(len(self.pieces)))

    def _piece_loss(self, index: int, spec: GroupSpec, piece: int) -> float:
        error = self._curves[index][piece](spec.bytes)
        return self._harm[piece](error) if self._harm else error


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
    return GroupSpec(
        (spec.modules[piece],), spec.d_in, (spec.d_out[piece],), spec.module_codes(piece), None, spec.method
    )


def profile(
    view: ModelView,
    groups: Sequence[PlannedGroup],
    families: Sequence[Family],
    keep: float,
    store: StatisticsStore,
    *,
    ids: Tensor | None,
    relative: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    fisher: Mapping[str, Tensor],
) -> list[Profile]:
    """Solve trials of every group, measure the harm of some, and predict the loss of every candidate.

    Args:
        view: of the real model.
        groups: each with one input.
        families: what may be chosen.
        keep: share of bytes that all groups together keep.
        store: statistics of every layer.
        ids: calibration tokens on which harm is measured; None: losses are errors.
        relative: errors are relative errors of the weights, not squared errors of the outputs.
        seed: of the run.
        device: where to compute.
        dtype: the model's 16-bit float.
        progress: called as progress("plan", done, total, detail).
        fisher: mean squared gradient of every weight by name, for methods that need it.

    Returns:
        profiles in the order of the groups.
    """
    grid = shares(keep, FAR_DOWN if relative else REACH_DOWN)
    trier = Trier(families, grid, keep, dtype)
    if roomy(trier.active, groups, grid, keep):
        ids = None  # all can have the most there is: harm decides nothing
    found = [Profile(shape_of(group.spec), relative, _pieces(group, families)) for group in groups]
    measured: list[tuple[int, int, float]] = []
    with ExitStack() as stack:
        meter = None if ids is None else stack.enter_context(DamageMeter(view, probe_ids(ids), device))
        done = 0
        for layer in range(len(view.layers)):
            variants: list[dict[str, Tensor]] = []
            loaded: dict[LinearGroup, Statistics] = {}
            for index, group in enumerate(groups):
                if group.layer != layer:
                    continue
                progress("plan", done, len(groups), group.spec.name)
                if group.source not in loaded:
                    loaded = {group.source: store.load(group.source)}
                item, weights = found[index], [view.weight(name) for name in group.spec.modules]
                own = [fisher[name] for name in group.spec.modules if name in fisher]
                widths = [sum(piece.d_out) for piece in item.pieces]
                task = Task.of(
                    group.spec.name, weights, loaded[group.source], widths, seed=seed, device=device, fisher=own
                )
                item.families, item.seen, solved = trier.trials(item.shape, task)
                if meter is not None:
                    item.harm = [[] for _ in item.pieces]
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
                found[index].harm[piece].append((missed, divergence))
    for item in found:
        item.settle(grid)
    progress("plan", len(groups), len(groups))
    return found


def roomy(families: Sequence[Family], groups: Sequence[PlannedGroup], grid: Sequence[float], keep: float) -> bool:
    """Whether sizes do not depend on the budget and the largest of all groups fit together.

    Args:
        families: whose sizes come near the budget.
        groups: each with one input.
        grid: shares of bytes to consider.
        keep: share that all groups together keep.
    """
    if not families or not all(family.fixed for family in families):
        return False
    room = keep * sum(group.spec.dense_bytes for group in groups)
    for group in groups:
        sizes = [spec.bytes for family in families for spec in family.specs(shape_of(group.spec), grid)]
        room -= max(sizes, default=group.spec.dense_bytes)
    return room >= 0


def shape_of(spec: GroupSpec) -> GroupShape:
    """Names and sizes of a group."""
    return GroupShape(spec.modules, spec.d_in, spec.d_out)


def _pieces(group: PlannedGroup, families: Sequence[Family]) -> tuple[GroupShape, ...]:
    spec = group.spec
    if not any(family.each for family in families):
        return (shape_of(spec),)
    return tuple(GroupShape((name,), spec.d_in, (d,)) for name, d in zip(spec.modules, spec.d_out, strict=True))


def telling(solved: Sequence[tuple[Trial, Tensor]], task: Task, target: int) -> list[tuple[int, float, Tensor]]:
    """What to put in the place of each piece to learn how much its errors harm.

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
