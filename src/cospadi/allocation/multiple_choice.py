"""Multiple-choice knapsack: one option per group, least total loss within a byte budget (as in ROCKET)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cospadi.errors import BudgetError

MOST_STATES = 200_000
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """One way to store a group: its exact bytes and its predicted loss."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class _Frontier:
    """The options of a group that no other beats in both bytes and loss, by rising bytes. `index`: as given."""

    index: list[int]
    size: list[int]
    loss: list[float]


def knapsack(
    options: Sequence[Sequence[Candidate]],
    budget: int,
    *,
    cap: float | Sequence[float] | None = None,
) -> list[int]:
    """Choose one option for each group.

    Dominated options are removed first. The linear relaxation, solved exactly by its greedy algorithm, provides a lower
    bound, a multiplier (loss per byte) and a first solution, which greedy steps improve while they fit. A dynamic
    programme over the few groups whose choice is in doubt closes the gap. The result is optimal unless the programme
    had to thin out its states (more than 200 000). It depends on nothing but the arguments.

    Args:
        options: the candidates of each group, in any order.
        budget: total bytes.
        cap: largest loss of any group, or of each (ROCKET's guard against sacrificing single layers). If no option of a
            group meets it, the options of smallest loss remain.

    Returns:
        the index of the chosen option of each group. Their bytes never exceed the budget.

    Raises:
        BudgetError: if even the smallest options exceed the budget (names the smallest possible sum).
        ValueError: if a group has no option, bytes are negative, a loss is not finite, or there are not as many caps as
            groups.
    """
    fronts = _frontiers(options, cap)
    least = sum(front.size[0] for front in fronts)
    if least > budget:
        limit = "" if cap is None else " under the loss cap"
        raise BudgetError(f"the smallest possible size{limit} is {least:,} bytes, the budget is {budget:,}")
    relaxed = _relax(fronts, budget)
    choice = _fill(fronts, relaxed.choice, budget)
    choice = _exact(fronts, choice, relaxed, budget) or choice
    return [front.index[pick] for front, pick in zip(fronts, choice, strict=True)]


def smallest_cap(options: Sequence[Sequence[Candidate]], budget: int) -> float:
    """The smallest cap on the loss of any group that the budget allows.

    ROCKET caps losses at α times the mean loss at a uniform budget, with the smallest feasible α: this is that cap.

    Args:
        options: the candidates of each group.
        budget: total bytes.

    Raises:
        BudgetError: if even the smallest options exceed the budget.
        ValueError: as :func:`knapsack`.
    """
    fronts = _frontiers(options, None)
    least = sum(front.size[0] for front in fronts)
    if least > budget:
        raise BudgetError(f"the smallest possible size is {least:,} bytes, the budget is {budget:,}")
    # No group can do better than its best option, so the cap is at least the largest of these losses.
    caps = sorted({loss for front in fronts for loss in front.loss if loss >= max(f.loss[-1] for f in fronts)})
    low, high = 0, len(caps) - 1
    while low < high:
        middle = (low + high) // 2
        needed = sum(next(s for s, e in zip(f.size, f.loss, strict=True) if e <= caps[middle]) for f in fronts)
        low, high = (low, middle) if needed <= budget else (middle + 1, high)
    return caps[low] if caps else 0.0


def _frontiers(options: Sequence[Sequence[Candidate]], cap: float | Sequence[float] | None) -> list[_Frontier]:
    caps = [cap] * len(options) if cap is None or isinstance(cap, float | int) else list(cap)
    if len(caps) != len(options):
        raise ValueError(f"{len(caps)} caps for {len(options)} groups")
    fronts = []
    for number, (group, limit) in enumerate(zip(options, caps, strict=True)):
        if not group:
            raise ValueError(f"group {number} has no option")
        if any(option.bytes < 0 or not np.isfinite(option.loss) for option in group):
            raise ValueError(f"group {number} has an option of negative bytes or a loss that is not finite")
        limit = np.inf if limit is None else max(limit, min(option.loss for option in group))
        front = _Frontier([], [], [])
        for index in sorted(range(len(group)), key=lambda i: (group[i].bytes, group[i].loss, i)):
            option = group[index]
            if option.loss <= limit and (not front.loss or option.loss < front.loss[-1]):
                front.index.append(index)
                front.size.append(option.bytes)
                front.loss.append(float(option.loss))
        fronts.append(front)
    return fronts


def _loss(fronts: list[_Frontier], choice: list[int]) -> float:
    return sum(front.loss[pick] for front, pick in zip(fronts, choice, strict=True))


def _hull(front: _Frontier) -> list[int]:
    """The options on the lower convex hull of loss over bytes."""
    hull: list[int] = []
    for new in range(len(front.size)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            flat = (front.loss[a] - front.loss[b]) * (front.size[new] - front.size[a])
            if flat > (front.loss[a] - front.loss[new]) * (front.size[b] - front.size[a]):
                break
            hull.pop()
        hull.append(new)
    return hull


@dataclass(frozen=True)
class _Relaxed:
    """The linear relaxation: the choices before the one that it splits, the optimum, and the loss per byte there."""

    choice: list[int]
    bound: float
    multiplier: float


def _relax(fronts: list[_Frontier], budget: int) -> _Relaxed:
    """Solve the linear relaxation: take the steps along all hulls, steepest first, until one does not fit."""
    steps = []
    for number, front in enumerate(fronts):
        hull = _hull(front)
        for a, b in pairwise(hull):
            steps.append(((front.loss[a] - front.loss[b]) / (front.size[b] - front.size[a]), number, b))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    choice = [0] * len(fronts)
    left = budget - sum(front.size[0] for front in fronts)
    for slope, number, new in steps:
        cost = fronts[number].size[new] - fronts[number].size[choice[number]]
        if cost > left:
            return _Relaxed(choice, _loss(fronts, choice) - slope * left, slope)
        choice[number] = new
        left -= cost
    return _Relaxed(choice, _loss(fronts, choice), 0.0)


def _fill(fronts: list[_Frontier], choice: list[int], budget: int) -> list[int]:
    """Spend what is left of the budget, always on the fitting step of largest gain per byte, on or off the hull."""
    choice = list(choice)
    left = budget - sum(front.size[pick] for front, pick in zip(fronts, choice, strict=True))
    while True:
        best, move = 0.0, None
        for number, (front, now) in enumerate(zip(fronts, choice, strict=True)):
            for new in range(now + 1, len(front.size)):
                cost = front.size[new] - front.size[now]
                if cost > left:
                    break
                gain = (front.loss[now] - front.loss[new]) / cost
                if gain > best:
                    best, move = gain, (number, new, cost)
        if move is None:
            return choice
        choice[move[0]] = move[1]
        left -= move[2]


@dataclass(frozen=True)
class _Stage:
    """States after one more group: non-dominated pairs of bytes and loss, with the parent and option of each."""

    size: Integers
    reduced: Floats
    parent: Integers
    option: Integers


def _exact(fronts: list[_Frontier], choice: list[int], relaxed: _Relaxed, budget: int) -> list[int] | None:
    """The best solution that improves on `choice`, by dynamic programming over a growing core of groups.

    All groups start with the relaxation's choice and are opened one after another, those with the cheapest alternatives
    first. A state is a sum of bytes and of reduced costs loss + multiplier · bytes − minimum. No solution is better
    than bound + reduced cost, so states beyond the gap to the best known solution are dropped, as are dominated ones.
    Every state completed by the relaxation's choice is a solution, so the gap closes along the way (after Pisinger, A
    minimal algorithm for the multiple-choice knapsack problem, 1995). More than `MOST_STATES` states are thinned to
    those of smallest reduced cost.

    Returns:
        the solution, or None if none is better (proven unless states were thinned).
    """
    start = relaxed.choice
    room = budget - sum(front.size[pick] for front, pick in zip(fronts, start, strict=True))
    base = _loss(fronts, start)
    best = _loss(fronts, choice)
    core = _core(fronts, relaxed, best - relaxed.bound)
    # the bytes that groups still closed can add or save
    adds = [max(int(size.max()), 0) for _, _, size, _ in core]
    takes = [min(int(size.min()), 0) for _, _, size, _ in core]
    size, reduced = np.zeros(1, np.int64), np.zeros(1)
    stages: list[_Stage] = []
    winner: tuple[int, int] | None = None
    for number, (_, _, more, cost) in enumerate(core):
        size, reduced = (size[:, None] + more).ravel(), (reduced[:, None] + cost).ravel()
        parent, option = np.divmod(np.arange(size.size), len(more))
        reach = np.minimum(room, size + sum(adds[number + 1 :]))
        hope = base + reduced - relaxed.multiplier * reach
        alive = np.flatnonzero((hope < best) & (size + sum(takes[number + 1 :]) <= room))
        alive = alive[_undominated(size[alive], reduced[alive] - relaxed.multiplier * size[alive])]
        if alive.size > MOST_STATES:
            alive = np.sort(alive[np.argsort(reduced[alive], kind="stable")[:MOST_STATES]])
        size, reduced = size[alive], reduced[alive]
        stages.append(_Stage(size, reduced, parent[alive], option[alive]))
        loss = np.where(size <= room, base + reduced - relaxed.multiplier * size, np.inf)
        if loss.size and loss.min() < best:
            best, winner = float(loss.min()), (number, int(loss.argmin()))
    if winner is None:
        return None
    found, state = list(start), winner[1]
    for number in range(winner[0], -1, -1):
        group, picks, _, _ = core[number]
        found[group] = int(picks[stages[number].option[state]])
        state = int(stages[number].parent[state])
    return found


def _core(fronts: list[_Frontier], relaxed: _Relaxed, gap: float) -> list[tuple[int, Integers, Integers, Floats]]:
    """Groups with more than one option within the gap, cheapest alternative first.

    Returns:
        for each: its number, its options, and their bytes and reduced costs relative to the relaxation's choice.
    """
    core = []
    for number, (front, now) in enumerate(zip(fronts, relaxed.choice, strict=True)):
        size = np.array(front.size, np.int64)
        cost = np.array(front.loss) + relaxed.multiplier * size
        cost -= cost[now]
        near = np.flatnonzero((cost < gap) | (np.arange(len(cost)) == now))
        if near.size > 1:
            core.append((number, near, size[near] - size[now], cost[near].clip(0)))
    return sorted(core, key=lambda group: (np.sort(group[3])[1], group[0]))


def _undominated(size: Integers, loss: Floats) -> Integers:
    """Indices of the pairs that no other undercuts in both size and loss, by rising size."""
    order = np.lexsort((loss, size))
    lowest = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], lowest[1:] < lowest[:-1]])] if order.size else order
