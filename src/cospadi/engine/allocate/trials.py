"""Which candidates of a group are solved, and what need not be solved again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod

from torch import Tensor

from cospadi.engine.allocate.candidates import TINY, Task, Trial, anchors, error_curve, solve_trial
from cospadi.format import GroupShape, Spec
from cospadi.methods.representation import Representation

ANCHORS, COSTLY_ANCHORS = 3, 2
"""Trials per representation and group, where sizes are continuous."""
TEACHERS = 2
"""Groups of a kind on which a representation is solved before its errors are carried over to others."""
NEAR = 0.75
"""A representation that ends below this share of the budget is not tried."""
BEHIND = 1.3
"""A costly representation is given up for a kind of groups where its error was this many times that of others."""

Kind = tuple[tuple[str, ...], int, tuple[int, ...]]
Solved = list[tuple[Trial, Tensor]]


def kind_of(shape: GroupShape) -> Kind:
    """What groups of one kind have in common: names and sizes of their layers."""
    return tuple(name.rsplit(".", 1)[-1] for name in shape.modules), shape.d_in, shape.d_out


class Trier:
    """Solves the trials of one group after another.

    Groups are of one kind if their layers have the same names and sizes. How much worse than a given representation
    another one is hardly differs within a kind (by a few per cent), so it is found on the first groups of each kind
    and carried over. A costly representation is given up for the kind where it was far behind once, or behind at all on
    every one of the first groups.

    Args:
        offered: representations that may be chosen.
        grid: shares of the dense bytes to consider.
        keep: share that all groups together keep.
    """

    def __init__(self, offered: Sequence[Representation], grid: Sequence[float], keep: float) -> None:
        self.offered, self.grid, self.keep = offered, grid, keep
        # What is only good for far fewer bytes serves a few insensitive groups at best.
        self.near = [index for index, item in enumerate(offered) if item.most >= NEAR * keep]
        self.ratios: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)
        self.lags: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)

    @property
    def active(self) -> list[Representation]:
        """Families whose sizes come near the budget."""
        return [self.offered[index] for index in self.near]

    def trials(self, shape: GroupShape, task: Task) -> tuple[dict[int, Representation], dict[int, list[Trial]], Solved]:
        """Solve what has to be solved of a group.

        Args:
            shape: of the group.
            task: its weights and Gram.

        Returns:
            by their numbers, the representations that are worth considering and their trials; and the trials that were
            solved, with their weights.
        """
        kind = kind_of(shape)
        seen: dict[int, list[Trial]] = {}
        solved: Solved = []
        for index in [i for i in self.near if not self._given_up(kind, i)] or self.near:
            item = self.offered[index]
            specs = self._specs(item, shape, [trial.spec for trials in seen.values() for trial in trials])
            if not specs:
                continue
            known = [trial for other, trials in seen.items() if not self.offered[other].learnt for trial in trials]
            learnt = self.ratios[kind, index]
            if item.learnt and known and len(learnt) >= TEACHERS:
                seen[index] = [_carried_over(spec, known, learnt) for spec in specs]
                continue
            new = self._solve(item, specs, task, [trial for trial, _ in solved], shape)
            seen[index] = [trial for trial, _ in new]
            solved += new
            if item.learnt and known and len(learnt) < TEACHERS:
                learnt.append(seen[index][0].total / max(_nearest(specs[0], known).total, TINY))
        self._compare(kind, shape, seen)
        if not seen:  # far too small a budget: it takes the smallest there is to say so
            index, spec = min(
                ((i, item.smallest(shape)) for i, item in enumerate(self.offered)), key=lambda pair: pair[1].bytes
            )
            solved = [solve_trial(task, self.offered[index], spec)]
            seen[index] = [trial for trial, _ in solved]
        return {index: self.offered[index] for index in seen}, seen, solved

    def _specs(self, item: Representation, shape: GroupShape, taken: list[Spec]) -> list[Spec]:
        target = int(self.keep * shape.dense_bytes)
        specs = anchors(item.specs(shape, self.grid), target, COSTLY_ANCHORS if item.costly else ANCHORS)
        return [spec for spec in specs if spec not in taken] if item.fixed else specs

    def _solve(
        self, item: Representation, specs: list[Spec], task: Task, others: list[Trial], shape: GroupShape
    ) -> Solved:
        """All specs; of a costly representation only the one nearest to the target where that is far behind."""
        if item.costly and others:
            target = self.keep * shape.dense_bytes
            first = min(specs, key=lambda spec: abs(spec.bytes - target))
            found = [solve_trial(task, item, first)]
            if (lag := _lag([found[0][0]], others, shape)) is not None and lag > BEHIND:
                return found
            specs = [spec for spec in specs if spec is not first]
            found += [solve_trial(task, item, spec) for spec in specs]
            return sorted(found, key=lambda pair: pair[0].spec.bytes)
        return [solve_trial(task, item, spec) for spec in specs]

    def _compare(self, kind: Kind, shape: GroupShape, seen: dict[int, list[Trial]]) -> None:
        """Note by how much every costly representation is behind all others, or ahead of them."""
        for index, trials in seen.items():
            if self.offered[index].costly:
                others = [trial for other, found in seen.items() if other != index for trial in found]
                lag = _lag(trials, others, shape)
                self.lags[kind, index].append(0.0 if lag is None else lag)

    def _given_up(self, kind: Kind, index: int) -> bool:
        lags = self.lags[kind, index]
        return any(lag > BEHIND for lag in lags) or (len(lags) >= TEACHERS and min(lags) > 1)


def _nearest(spec: Spec, known: list[Trial]) -> Trial:
    """The solved trial nearest in bytes."""
    return min(known, key=lambda trial: abs(trial.spec.bytes - spec.bytes))


def _carried_over(spec: Spec, known: list[Trial], ratios: list[float]) -> Trial:
    near = _nearest(spec, known)
    ratio = prod(ratios) ** (1 / len(ratios))
    return Trial(spec, tuple(ratio * missed for missed in near.missed), near.relative * ratio**0.5)


def _lag(trials: list[Trial], others: list[Trial], shape: GroupShape) -> float | None:
    """Least quotient of trials' errors and those of others of the same sizes; None if the others are all larger."""
    best: list[Trial] = []
    for trial in sorted(others, key=lambda t: (t.spec.bytes, t.total)):
        if not best or trial.total < best[-1].total:
            best.append(trial)
    if not best or min(trial.spec.bytes for trial in trials) < best[0].spec.bytes:
        return None
    curve = error_curve([(trial.spec.bytes, trial.total) for trial in best], shape.dense_bytes)
    return min(trial.total / max(curve(trial.spec.bytes), TINY) for trial in trials)
