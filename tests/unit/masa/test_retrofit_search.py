"""The choice of atoms and ranks against trying everything."""

import itertools

import numpy as np
import pytest

from cospadi.errors import BudgetError
from cospadi.masa.retrofit.search import AtomChoice, Projection, allot


def family(seed, layers, rank_bytes, atom_bytes, most_rank=4):
    """A random family in which more atoms leave smaller residuals, and as many as layers leave none."""
    random = np.random.default_rng(seed)
    choices = []
    for atoms in range(layers + 1):
        left = 1 - atoms / layers
        gains = tuple(np.sort(left * random.gamma(0.5, size=most_rank if left else 0))[::-1] for _ in range(layers))
        choices.append(AtomChoice(atoms, atoms * atom_bytes, gains))
    return Projection(rank_bytes, tuple(choices))


def cost(families, allotted):
    return sum(
        next(c for c in f.choices if c.atoms == a.atoms).bytes + f.rank_bytes * sum(a.ranks)
        for f, a in zip(families, allotted, strict=True)
    )


def error(families, allotted):
    total = 0.0
    for f, a in zip(families, allotted, strict=True):
        choice = next(c for c in f.choices if c.atoms == a.atoms)
        total += sum(float(values[rank:].sum()) for values, rank in zip(choice.gains, a.ranks, strict=True))
    return total


def brute_force(families, budget):
    """Least error over all numbers of atoms and all ranks."""
    options = []
    for f in families:
        own = []
        for c in f.choices:
            least = 0 if c.atoms else 1
            for ranks in itertools.product(*[range(least, len(v) + 1) for v in c.gains]):
                missed = sum(float(v[r:].sum()) for v, r in zip(c.gains, ranks, strict=True))
                own.append((c.bytes + f.rank_bytes * sum(ranks), missed))
        options.append(own)
    sums = [(sum(c for c, _ in pick), sum(e for _, e in pick)) for pick in itertools.product(*options)]
    return min(e for c, e in sums if c <= budget)


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_trying_everything(seed):
    families = [family(2 * seed, 2, 10, 33, 3), family(2 * seed + 1, 2, 10, 33, 3)]
    for budget in (50, 70, 100, 140, 180):
        allotted = allot(families, budget)
        assert cost(families, allotted) <= budget
        assert error(families, allotted) == pytest.approx(brute_force(families, budget), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_close_to_the_best_with_unequal_sizes(seed):
    """Sizes that do not divide each other make a knapsack; the greedy part may miss the last bytes of it."""
    families = [family(seed, 2, 7, 30, 4), family(seed + 50, 2, 13, 41, 4)]
    for budget in (60, 90, 120, 150):
        allotted = allot(families, budget)
        found, best = error(families, allotted), brute_force(families, budget)
        assert cost(families, allotted) <= budget
        assert found <= best + 0.12 * sum(f.choices[0].error for f in families)


@pytest.mark.parametrize("seed", range(8))
def test_never_over_budget_and_no_cheaper_rank_left_out(seed):
    random = np.random.default_rng(seed)
    families = [
        family(seed * 10 + i, int(random.integers(1, 5)), int(random.integers(5, 50)), 90, 12) for i in range(6)
    ]
    least = sum(min(f.least_bytes(c) for c in f.choices) for f in families)
    for budget in random.integers(least, 4 * least, 5).tolist():
        allotted = allot(families, budget)
        spent = cost(families, allotted)
        assert spent <= budget
        for f, a in zip(families, allotted, strict=True):
            choice = next(c for c in f.choices if c.atoms == a.atoms)
            if any(rank < len(values) for values, rank in zip(choice.gains, a.ranks, strict=True)):
                assert spent + f.rank_bytes > budget  # whatever would still fit has been bought


def test_more_bytes_are_never_worse_by_much_and_all_bytes_leave_nothing():
    families = [family(i, 3, 11, 50, 6) for i in range(4)]
    whole = sum(f.choices[-1].bytes for f in families)
    assert error(families, allot(families, whole)) == 0
    errors = [error(families, allot(families, budget)) for budget in range(150, whole + 1, 25)]
    assert all(later <= earlier * 1.05 for earlier, later in itertools.pairwise(errors))


def test_layers_without_atoms_keep_at_least_one_rank():
    choice = AtomChoice(0, 0, (np.array([5.0, 1.0]), np.array([0.0, 0.0])))
    assert allot([Projection(10, (choice,))], 20)[0].ranks == (1, 1)
    # what has no gain is not bought
    assert allot([Projection(10, (choice,))], 1000)[0].ranks == (2, 1)


def test_too_small_a_budget_names_the_least():
    families = [family(0, 2, 10, 33)]
    with pytest.raises(BudgetError, match="least possible size is 20 bytes, the budget is 19"):
        allot(families, 19)
