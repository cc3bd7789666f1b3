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

    Each spectrum is divided by its Frobenius norm; all values are sorted together, and from the largest down each is
    paid for with its group's cost until the budget is spent. A group whose energy lies in few directions gets
    little, a flat one much.

    Args:
        spectra: singular values of each group (COMPOT takes those of the weights as they are, not whitened).
        cost_per_rank: bytes of one rank of each group.
        budget: bytes for all groups together.
        dense_bytes: bytes of each group at 16 bits a weight, for the guards; None: the cost of all its ranks.
        least_keep: share of its dense bytes that each group gets at least.
        most_keep: share that each group gets at most.
        per_byte: sort by squared value per byte, which minimises the discarded energy, instead of by value.

    Returns:
        bytes of each group; they sum to `budget` unless every group has reached its most.

    Raises:
        BudgetError: if the least shares alone exceed the budget.
        ValueError: if the arguments do not belong together or a value is negative or not finite.
    """
    values = [np.asarray(spectrum, dtype=np.float64).ravel() for spectrum in spectra]
    if len(values) != len(cost_per_rank) or (dense_bytes is not None and len(dense_bytes) != len(values)):
        raise ValueError("spectra, costs and sizes must be as many")
    if any(cost < 1 for cost in cost_per_rank) or not 0 <= least_keep <= most_keep:
        raise ValueError("a rank costs at least one byte, and 0 <= least_keep <= most_keep")
    if any(not np.isfinite(spectrum).all() or (spectrum < 0).any() for spectrum in values):
        raise ValueError("singular values must be finite and not negative")
    sizes = dense_bytes or [len(v) * cost for v, cost in zip(values, cost_per_rank, strict=True)]
    least = [int(np.ceil(least_keep * size)) for size in sizes]
    most = [max(int(most_keep * size), low) for size, low in zip(sizes, least, strict=True)]
    if sum(least) > budget:
        raise BudgetError(f"the guards alone take {sum(least):,} bytes, the budget is {budget:,}; lower least_keep")

    owner = np.concatenate([np.full(len(v), i) for i, v in enumerate(values)]) if values else np.empty(0, int)
    place = np.concatenate([np.arange(1, len(v) + 1) for v in values]) if values else np.empty(0, int)
    worth = np.concatenate([_worth(v, c, per_byte) for v, c in zip(values, cost_per_rank, strict=True)] or [owner])
    budgets, left = list(least), budget - sum(least)
    full: set[int] = set()
    # ranks of a group are bought in order; the guard has paid for the first ones already
    for index in np.lexsort((owner, place, -worth)):
        i = int(owner[index])
        if left <= 0 or len(full) == len(values):
            break
        price = min(int(place[index]) * cost_per_rank[i], most[i]) - budgets[i]
        if price <= 0:
            if budgets[i] >= most[i]:
                full.add(i)
            continue
        bought = min(price, left)  # the last one bought may be a part of a rank, so that the budget is used up
        budgets[i] += bought
        left -= bought
    for i in range(len(budgets)):  # every rank bought and bytes left: up to the guards
        more = min(left, most[i] - budgets[i])
        budgets[i] += more
        left -= more
    return budgets


def _worth(values: npt.NDArray[np.float64], cost: int, per_byte: bool) -> npt.NDArray[np.float64]:
    norm = np.sqrt(np.square(values).sum())
    scaled = np.sort(values / norm if norm > 0 else values)[::-1]
    return np.square(scaled) / cost if per_byte else scaled
