"""What every candidate of every group costs the model: trials, measured harm, and curves between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf, prod

import torch
from torch import Tensor

from cospadi.calibration import Statistics, StatisticsStore
from cospadi.engine.candidates import TINY, Curve, Family, Trial, anchors, solve_trial
from cospadi.engine.damage import DamageMeter, probe_ids
from cospadi.engine.plan import PlannedGroup
from cospadi.format import GroupSpec
from cospadi.methods import GroupShape
from cospadi.model_view import LinearGroup, ModelView

ANCHORS, COSTLY_ANCHORS = 4, 2
"""Trials per family and group, where sizes are continuous."""
TEACHERS = 2
"""Groups of a kind on which a family is solved before its errors are carried over to others."""
MEASURED = 3
"""Trials per group whose harm is measured."""
STEPS_PER_OCTAVE = 8
NEAR = 0.75
"""A family that ends below this share of the budget is not tried."""
BEHIND = 1.3
"""A costly family is given up for a kind of groups where its error was so many times that of others of one size."""


def shares(keep: float) -> list[float]:
    """Shares of bytes to consider for a group when all together keep `keep`: a quarter of it to four times, below 1."""
    steps = range(-2 * STEPS_PER_OCTAVE, 2 * STEPS_PER_OCTAVE + 1)
    grid = [keep * 2 ** (step / STEPS_PER_OCTAVE) for step in steps]
    fine = [keep + (1 - keep) * i / 8 for i in range(1, 8)] if keep > 0.5 else []
    return sorted({share for share in [*grid, *fine] if share < 1})


@dataclass(frozen=True)
class Option:
    """A candidate of a group and its predicted loss."""

    family: Family
    spec: GroupSpec
    loss: float


@dataclass
class Profile:
    """What is known of a group.

    Attributes:
        shape: of the group.
        seen: solved trials, by family.
        harm: pairs of squared error and measured divergence.
        relative: losses are errors of the weights instead of their outputs.
        options: all candidates, once known.
    """

    shape: GroupShape
    relative: bool
    seen: dict[int, list[Trial]] = field(default_factory=dict)
    families: dict[int, Family] = field(default_factory=dict)
    harm: list[tuple[float, float]] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    _curves: dict[int, Curve] = field(default_factory=dict)
    _harm: Curve | None = None

    def settle(self, grid: Sequence[float]) -> None:
        """Turn what was solved and measured into candidates at all shares of the grid."""
        for index, trials in self.seen.items():
            points = [(float(t.spec.bytes), t.relative if self.relative else t.missed) for t in trials]
            # with nothing else known, errors fall at least a little with every byte
            self._curves[index] = Curve(points, falling=True, left=(-inf, -0.1), right=(-inf, -0.1))
        if self.harm:
            # For small errors the divergence is a quadratic form, hence proportional to the squared error.
            self._harm = Curve(self.harm, falling=False, left=(1.0, 1.0), right=(1.0, 2.0))
        for index in self.seen:
            family = self.families[index]
            specs = {spec.bytes: spec for spec in family.specs(self.shape, grid)}
            specs |= {trial.spec.bytes: trial.spec for trial in self.seen[index]}
            self.options += [Option(family, spec, self._loss(index, spec)) for _, spec in sorted(specs.items())]
        self.seen = {index: [] for index in self.seen}

    def predict(self, family: Family, spec: GroupSpec) -> float:
        """Predicted loss of any spec of a family that was tried."""
        return self._loss(next(i for i, known in self.families.items() if known is family), spec)

    def _loss(self, index: int, spec: GroupSpec) -> float:
        error = self._curves[index](spec.bytes)
        return self._harm(error) if self._harm else error

    def frontier(self) -> list[Trial]:
        """Solved trials that no other one beats in both bytes and error, by rising bytes."""
        best: list[Trial] = []
        every = [trial for trials in self.seen.values() for trial in trials if trial.weight is not None]
        for trial in sorted(every, key=lambda t: (t.spec.bytes, t.missed)):
            if not best or trial.missed < best[-1].missed:
                best.append(trial)
        return best


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
    progress: Callable[..., None],
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

    Returns:
        profiles in the order of the groups.
    """
    grid = shares(keep)
    found = [Profile(shape_of(group.spec), relative) for group in groups]
    trier = _Trier(families, grid, keep, seed, device, dtype)
    measured: list[tuple[int, float]] = []
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
                weights = [view.weight(name).float() for name in group.spec.modules]
                trier.fill(found[index], weights, loaded[group.source])
                done += 1
                if meter is not None:
                    for trial in _telling(found[index].frontier(), int(keep * group.spec.dense_bytes)):
                        assert trial.weight is not None
                        pieces = torch.split(trial.weight, list(group.spec.d_out), 1)
                        variants.append(dict(zip(group.spec.modules, pieces, strict=True)))
                        measured.append((index, trial.missed))
                else:
                    found[index].settle(grid)
            if meter is not None:
                meter.layer(layer, list(variants))
        if meter is not None:
            for (index, missed), divergence in zip(measured, meter.divergences(), strict=True):
                found[index].harm.append((missed, divergence))
            for item in found:
                item.settle(grid)
    progress("plan", len(groups), len(groups))
    return found


def shape_of(spec: GroupSpec) -> GroupShape:
    """Names and sizes of a group."""
    return GroupShape(spec.modules, spec.d_in, spec.d_out)


def _telling(trials: list[Trial], target: int) -> list[Trial]:
    """The few trials whose harm is worth measuring: about the target, and well below it, where harm is not linear."""
    wanted = [target * factor for factor in (0.4, 0.7, 1.0)][:MEASURED]
    chosen = {min(range(len(trials)), key=lambda i: abs(trials[i].spec.bytes - size)) for size in wanted}
    for index in range(len(trials)):  # fill up from below
        if len(chosen) < MEASURED:
            chosen.add(index)
    return [trials[i] for i in sorted(chosen)]


class _Trier:
    """Solves the trials of one group after another, and learns what need not be solved again.

    Groups are of one kind if their layers have the same names and sizes. How much worse than a given representation
    another one is hardly differs within a kind (by a few per cent), so it is found on the first groups of each kind
    and carried over; and a costly family that has shown to be far behind is given up for the kind.
    """

    def __init__(
        self,
        families: Sequence[Family],
        grid: Sequence[float],
        keep: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.families, self.grid, self.keep = families, grid, keep
        # What is only good for far fewer bytes serves a few insensitive groups at best.
        self.idle = {index for index, family in enumerate(families) if family.most < NEAR * keep}
        self.seed, self.device, self.dtype = seed, device, dtype
        self.behind: defaultdict[Kind, set[int]] = defaultdict(set)
        self.ratios: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)

    def fill(self, item: Profile, weights: list[Tensor], statistics: Statistics) -> None:
        """Give a group its trials."""
        shape = item.shape
        kind = tuple(name.rsplit(".", 1)[-1] for name in shape.modules), shape.d_in, shape.d_out
        target = int(self.keep * shape.dense_bytes)
        known: list[Trial] = []
        for index, family in enumerate(self.families):
            if index in self.behind[kind] | self.idle:
                continue
            specs = anchors(family.specs(shape, self.grid), target, COSTLY_ANCHORS if family.costly else ANCHORS)
            if family.fixed:
                specs = [spec for spec in specs if all(spec != trial.spec for trial in known)]
            if not specs:
                continue
            learnt = self.ratios[kind, index]
            if family.learnt and known and len(learnt) >= TEACHERS:
                trials = [_carried_over(spec, known, learnt) for spec in specs]
            else:
                trials = [
                    solve_trial(family, spec, weights, statistics, seed=self.seed, device=self.device, dtype=self.dtype)
                    for spec in specs
                ]
            if family.learnt and known and len(learnt) < TEACHERS:
                learnt.append(trials[0].missed / max(_reference(specs[0], known).missed, TINY))
            if family.costly and _far_behind(item.frontier(), trials):
                self.behind[kind].add(index)
            if not family.learnt:
                known += trials
            item.seen[index], item.families[index] = trials, family
        if not item.seen:  # far too small a budget: it takes the smallest there is to say so
            index, spec = min(
                ((i, family.smallest(shape)) for i, family in enumerate(self.families)), key=lambda pair: pair[1].bytes
            )
            trial = solve_trial(
                self.families[index], spec, weights, statistics, seed=self.seed, device=self.device, dtype=self.dtype
            )
            item.seen[index], item.families[index] = [trial], self.families[index]


Kind = tuple[tuple[str, ...], int, tuple[int, ...]]


def _reference(spec: GroupSpec, known: list[Trial]) -> Trial:
    """The solved trial nearest in bytes."""
    return min(known, key=lambda trial: abs(trial.spec.bytes - spec.bytes))


def _carried_over(spec: GroupSpec, known: list[Trial], ratios: list[float]) -> Trial:
    near = _reference(spec, known)
    ratio = prod(ratios) ** (1 / len(ratios))
    return Trial(spec, near.missed * ratio, near.relative * ratio**0.5, None)


def _far_behind(frontier: list[Trial], trials: list[Trial]) -> bool:
    if not frontier or trials[0].spec.bytes < frontier[0].spec.bytes:
        return False  # nothing else is as small
    curve = Curve([(t.spec.bytes, t.missed) for t in frontier], falling=True, left=(-inf, inf), right=(0.0, 0.0))
    return all(trial.missed > BEHIND * curve(trial.spec.bytes) for trial in trials)
