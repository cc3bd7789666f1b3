from itertools import combinations, pairwise

import pytest
import torch

from cospadi.errors import BudgetError
from cospadi.pruning.depth.choose_runs import choose_runs


def every_choice(depth, blocks, count, first, gap):
    """All sets of runs, by brute force."""
    runs = [(a, b) for a in range(first, depth) for b in range(a + 1, depth + 1)]
    for chosen in combinations(runs, count):
        apart = all(x[1] + gap <= y[0] for x, y in pairwise(chosen))
        if apart and sum(b - a for a, b in chosen) == blocks:
            yield chosen


@pytest.mark.parametrize("touching", [False, True])
@pytest.mark.parametrize(("blocks", "count"), [(1, 1), (3, 1), (2, 2), (4, 2), (4, 3), (3, 3)])
def test_runs_have_the_least_total_distance(blocks, count, touching):
    distances = torch.rand(9, 9, generator=torch.Generator().manual_seed(blocks * 10 + count))
    found = choose_runs(distances, blocks, count, first=1, touching=touching)
    choices = list(every_choice(8, blocks, count, 1, 0 if touching else 1))
    best = min(choices, key=lambda runs: sum(float(distances[run]) for run in runs))
    removed = {index for a, b in found for index in range(a, b)}
    assert removed == {index for a, b in best for index in range(a, b)}
    assert all(x[1] < y[0] for x, y in pairwise(found))  # touching runs have become one


def test_what_does_not_fit_is_refused():
    distances = torch.rand(6, 6)
    with pytest.raises(BudgetError, match="3 runs"):
        choose_runs(distances, 4, 3, first=1)
    with pytest.raises(BudgetError):
        choose_runs(distances, 5, 1, first=1)
