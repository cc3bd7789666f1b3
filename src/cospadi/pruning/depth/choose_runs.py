"""Choosing several runs of blocks at once, exactly."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from cospadi.errors import BudgetError


def choose_runs(
    distances: Tensor, blocks: int, count: int, *, first: int = 0, touching: bool = False
) -> list[tuple[int, int]]:
    """The `count` runs of blocks, `blocks` long together, of least total distance, by dynamic programming.

    Args:
        distances: (depths, depths): [a, b] is the price of removing blocks a … b-1 as one run.
        blocks: how many go in all.
        count: of runs, each of at least one block.
        first: the first block that may go.
        touching: whether runs may be neighbours; they are then merged into one, priced as two.

    Returns:
        runs as (first block, one past the last), in order.

    Raises:
        BudgetError: if there are no such runs.
    """
    depth = len(distances) - 1
    prices = distances.tolist()
    gap = 0 if touching else 1

    @cache
    def best(position: int, left: int, of_blocks: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        """Least price of `left` runs with `of_blocks` blocks at or after `position`."""
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
            f"{'' if touching else ' and a block between runs'}: give fewer transforms or fewer blocks"
        )
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
