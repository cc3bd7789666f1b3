"""Pooled singular values: one threshold for all groups (COMPOT, arXiv 2602.15200)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cospadi.errors import BudgetError


def pooled_spectra(
    spectra: Sequence[npt.ArrayLike],
    cost_per_rank: Sequence[int],
    budget: int,
    *,
    dense_bytes: Sequence[int] | None = None,
    least_keep: float = 0.0,
    most_keep: float = 1.0,
    per_byte: bool = False,
) -> list[int]:
    """Budgets by truncating the pooled, normalised singular values of all groups at once.

    Each spectrum is divided by its Frobenius norm. All values are sorted together; from the largest down, each costs
    one rank of its group until the budget is spent. A group whose energy lies in few directions gets few bytes, one
    with a flat spectrum many.

    Args:
        spectra: singular values of each group (COMPOT uses the unwhitened weights).
        cost_per_rank: bytes per rank of each group.
        budget: bytes for all groups together.
        dense_bytes: bytes of each group at 16 bits a weight, to which the limits refer; None: the cost of all its
            ranks.
        least_keep: smallest share of its dense bytes that a group gets.
        most_keep: largest share that a group gets.
        per_byte: sort by squared value per byte, which minimises the discarded energy, instead of by value.

    Returns:
        bytes of each group; they sum to `budget` unless every group has reached its limit.

    Raises:
        BudgetError: if the smallest shares alone exceed the budget.
        ValueError: if the arguments differ in length, or a value is negative or not finite.
    """
    values = [np.asarray(spectrum, dtype=np.float64).ravel() for spectrum in spectra]
    if len(values) != len(cost_per_rank) or (dense_bytes is not None and len(dense_bytes) != len(values)):
        raise ValueError("spectra, costs and sizes must have the same length")
    if any(cost < 1 for cost in cost_per_rank) or not 0 <= least_keep <= most_keep:
        raise ValueError("a rank costs at least one byte, and 0 <= least_keep <= most_keep")
    if any(not np.isfinite(spectrum).all() or (spectrum < 0).any() for spectrum in values):
        raise ValueError("singular values must be finite and not negative")
    sizes = dense_bytes or [len(v) * cost for v, cost in zip(values, cost_per_rank, strict=True)]
    least = [int(np.ceil(least_keep * size)) for size in sizes]
    most = [max(int(most_keep * size), low) for size, low in zip(sizes, least, strict=True)]
    if sum(least) > budget:
        raise BudgetError(
            f"the smallest shares alone take {sum(least):,} bytes, the budget is {budget:,}: lower least_keep"
        )

    owner = np.concatenate([np.full(len(v), i) for i, v in enumerate(values)]) if values else np.empty(0, int)
    place = np.concatenate([np.arange(1, len(v) + 1) for v in values]) if values else np.empty(0, int)
    worth = np.concatenate([_worth(v, c, per_byte) for v, c in zip(values, cost_per_rank, strict=True)] or [owner])
    budgets, left = list(least), budget - sum(least)
    full: set[int] = set()
    # Ranks of a group are bought in order; its smallest share has already paid for the first ones.
    for index in np.lexsort((owner, place, -worth)):
        i = int(owner[index])
        if left <= 0 or len(full) == len(values):
            break
        price = min(int(place[index]) * cost_per_rank[i], most[i]) - budgets[i]
        if price <= 0:
            if budgets[i] >= most[i]:
                full.add(i)
            continue
        bought = min(price, left)  # the last purchase may be part of a rank, so that the budget is used up
        budgets[i] += bought
        left -= bought
    for i in range(len(budgets)):  # every rank is bought and bytes are left: fill up to the limits
        more = min(left, most[i] - budgets[i])
        budgets[i] += more
        left -= more
    return budgets


def _worth(values: npt.NDArray[np.float64], cost: int, per_byte: bool) -> npt.NDArray[np.float64]:
    norm = np.sqrt(np.square(values).sum())
    scaled = np.sort(values / norm if norm > 0 else values)[::-1]
    return np.square(scaled) / cost if per_byte else scaled
