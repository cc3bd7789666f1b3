"""Choose several runs of blocks at once, exactly."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from cospadi.errors import BudgetError


def choose_runs(
    distances: Tensor, blocks: int, count: int, *, first: int = 0, touching: bool = False
) -> list[tuple[int, int]]:
    """The `count` runs of `blocks` blocks in total with the least total distance, by dynamic programming.

    Args:
        distances: (depths, depths): [a, b] is the cost of removing blocks a … b-1 as one run.
        blocks: number of blocks to remove in all.
        count: number of runs, each of at least one block.
        first: the first block that may be removed.
        touching: whether runs may be adjacent; adjacent runs are merged into one but cost as much as two.

    Returns:
        runs as (first block, one past the last), in order.

    Raises:
        BudgetError: if no such runs exist.
    """
    depth = len(distances) - 1
    prices = distances.tolist()
    gap = 0 if touching else 1

    @cache
    def best(position: int, left: int, of_blocks: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        """Least cost of `left` runs with `of_blocks` blocks in total at or after `position`, and the runs."""
        if left == 0:
            return (0.0, ()) if of_blocks == 0 else (float("inf"), ())
        found: tuple[float, tuple[tuple[int, int], ...]] = (float("inf"), ())
        for start in range(position, depth):
            for stop in range(start + 1, min(depth, start + of_blocks - left + 1) + 1):
                price, rest = best(stop + gap, left - 1, of_blocks - (stop - start))
                if price + prices[start][stop] < found[0]:
                    found = (price + prices[start][stop], ((start, stop), *rest))
        return found

    price, runs = best(first, count, blocks)
    if price == float("inf"):
        raise BudgetError(
            f"cannot remove {blocks} of {depth} blocks in {count} runs that keep the first {first} blocks"
            f"{'' if touching else ' and a block between runs'}: use fewer transforms or remove fewer blocks"
        )
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
