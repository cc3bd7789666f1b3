"""How many atoms every projection shares, and which rank every layer's residual gets, under one byte budget.

A *projection* here is one projection of one group of layers. For a number of atoms S it costs the bytes of S matrices
and leaves each layer a residual, whose whitened singular values say what every further rank is worth. With all S fixed,
taking singular values by gain per byte is optimal; the S themselves are found by Lagrangian relaxation and then, one
projection after the other, by trying every other S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cospadi.errors import BudgetError

Floats = npt.NDArray[np.float64]
NEGLIGIBLE = 1e-12
"""Gains below this share of a projection's energy are rounding, and not worth a byte."""
_BISECTIONS = 80


@dataclass(frozen=True)
class AtomChoice:
    """A projection with a certain number of atoms.

    Attributes:
        atoms: S.
        bytes: of atoms and coefficients.
        gains: of each layer, the squared whitened singular values of its residual, largest first.
    """

    atoms: int
    bytes: int
    gains: tuple[Floats, ...]

    @property
    def least_rank(self) -> int:
        """Rank below which a layer would be left with nothing."""
        return 0 if self.atoms else 1

    @property
    def error(self) -> float:
        """Squared whitened error of all layers together, at rank 0."""
        return float(sum(values.sum() for values in self.gains))


@dataclass(frozen=True)
class Projection:
    """What may be chosen for one projection of one group of layers.

    Attributes:
        rank_bytes: of one rank of one layer.
        choices: one for every number of atoms that is tried.
    """

    rank_bytes: int
    choices: tuple[AtomChoice, ...]

    def least_bytes(self, choice: AtomChoice) -> int:
        """Bytes of a choice with the least ranks."""
        return choice.bytes + self.rank_bytes * choice.least_rank * len(choice.gains)


@dataclass(frozen=True)
class Allotment:
    """What was decided for a projection.

    Attributes:
        atoms: S.
        ranks: of each layer's residual.
    """

    atoms: int
    ranks: tuple[int, ...]


def allot(projections: Sequence[Projection], budget: int) -> list[Allotment]:
    """The numbers of atoms and the ranks of least total whitened error within the budget.

    Args:
        projections: all of them.
        budget: bytes for all together.

    Returns:
        one allotment per projection; together they never take more than `budget` bytes.

    Raises:
        BudgetError: if even the smallest choices take more (names the least possible).
    """
    least = sum(min(f.least_bytes(c) for c in f.choices) for f in projections)
    if least > budget:
        raise BudgetError(f"the least possible size is {least:,} bytes, the budget is {budget:,}")
    picks = _relaxed(projections, budget)
    best, ranks = _spend(projections, picks, budget)
    step = NEGLIGIBLE * sum(max(choice.error for choice in projection.choices) for projection in projections)
    improved = True
    while improved:
        improved = False
        for index, projection in enumerate(projections):
            for other in range(len(projection.choices)):
                tried = [*picks[:index], other, *picks[index + 1 :]]
                if other == picks[index] or _least(projections, tried) > budget:
                    continue
                error, found = _spend(projections, tried, budget)
                if error < best - step:
                    best, picks, ranks, improved = error, tried, found, True
    chosen = [projection.choices[pick] for projection, pick in zip(projections, picks, strict=True)]
    return [Allotment(choice.atoms, tuple(own)) for choice, own in zip(chosen, ranks, strict=True)]


def _least(projections: Sequence[Projection], picks: Sequence[int]) -> int:
    return sum(f.least_bytes(f.choices[pick]) for f, pick in zip(projections, picks, strict=True))


def _relaxed(projections: Sequence[Projection], budget: int) -> list[int]:
    """Choices at the price per byte at which, each projection deciding for itself, the budget is just kept."""
    smallest = [min(range(len(f.choices)), key=lambda i: f.least_bytes(f.choices[i])) for f in projections]
    highest = max((float(v[0]) for f in projections for c in f.choices for v in c.gains if len(v)), default=0.0)
    low, high, found = 0.0, highest + 1.0, smallest
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        picks, spent = [], 0
        for projection in projections:
            offers = [_at_price(projection, choice, price) for choice in projection.choices]
            pick = min(range(len(offers)), key=lambda i: (offers[i][0], offers[i][1]))
            picks.append(pick)
            spent += offers[pick][1]
        if spent <= budget:
            high, found = price, picks
        else:
            low = price
    return found


def _at_price(projection: Projection, choice: AtomChoice, price: float) -> tuple[float, int]:
    """Error plus price times bytes, and the bytes, with the ranks that are worth their price."""
    spent, error = choice.bytes, choice.error
    for values in choice.gains:
        rank = int(np.searchsorted(-values, -price * projection.rank_bytes, side="left"))
        rank = min(max(rank, choice.least_rank), len(values))
        spent += rank * projection.rank_bytes
        error -= float(values[:rank].sum())
    return error + price * spent, spent


def _spend(projections: Sequence[Projection], picks: Sequence[int], budget: int) -> tuple[float, list[list[int]]]:
    """Hand out what the atoms leave of the budget, by gain per byte.

    Returns:
        the total error, and the rank of every layer of every projection.
    """
    chosen = [projection.choices[pick] for projection, pick in zip(projections, picks, strict=True)]
    ranks = [[choice.least_rank] * len(choice.gains) for choice in chosen]
    left = budget - _least(projections, picks)
    error = sum(choice.error for choice in chosen)
    parts: list[tuple[Floats, int, int, int]] = []
    for number, (projection, choice) in enumerate(zip(projections, chosen, strict=True)):
        worth = NEGLIGIBLE * max(other.error for other in projection.choices)
        for layer, values in enumerate(choice.gains):
            error -= float(values[: choice.least_rank].sum())
            rest = values[choice.least_rank :]
            parts.append((rest[rest > worth], projection.rank_bytes, number, layer))
    gains = np.concatenate([part[0] for part in parts])
    costs = np.concatenate([np.full(len(part[0]), part[1], np.int64) for part in parts])
    owners = np.concatenate([np.full(len(part[0]), place, np.int64) for place, part in enumerate(parts)])
    order = np.argsort(-gains / costs, kind="stable")
    fits = int(np.searchsorted(np.cumsum(costs[order]), left, side="right"))
    taken = order[:fits]
    left -= int(costs[taken].sum())
    counts = np.bincount(owners[taken], minlength=len(parts))
    error -= float(gains[taken].sum())
    # What is left is less than the next in line costs; cheaper ranks further down may still fit.
    queue = order[fits:]
    while (queue := queue[costs[queue] <= left]).size:
        first, queue = queue[0], queue[1:]
        counts[owners[first]] += 1
        left -= int(costs[first])
        error -= float(gains[first])
    for (_, _, number, layer), count in zip(parts, counts.tolist(), strict=True):
        ranks[number][layer] += count
    return error, ranks
