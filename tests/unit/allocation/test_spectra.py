import numpy as np
import pytest

from cospadi.allocation import pooled_spectra
from cospadi.errors import BudgetError


def spectra(seed, lengths):
    rng = np.random.default_rng(seed)
    return [np.sort(np.abs(rng.normal(size=n)) * rng.uniform(0.1, 50))[::-1] for n in lengths]


def test_one_threshold_for_all_normalised_values():
    values, cost, budget = spectra(0, [30, 40, 25, 30]), 10, 600
    budgets = pooled_spectra(values, [cost] * 4, budget)
    assert sum(budgets) == budget
    normed = [value / np.linalg.norm(value) for value in values]
    threshold = np.sort(np.concatenate(normed))[::-1][budget // cost - 1]
    assert budgets == [cost * int((value >= threshold).sum()) for value in normed]


def test_scale_does_not_matter_but_shape_does():
    flat, steep = np.ones(20), 0.5 ** np.arange(20)
    budgets = pooled_spectra([flat, 1000 * steep], [8, 8], 160)
    assert budgets == pooled_spectra([1e-6 * flat, steep], [8, 8], 160)
    assert budgets[0] > budgets[1]


def test_per_byte_discards_the_least_energy():
    values, costs = spectra(1, [6, 5, 4]), [3, 7, 2]
    budgets = pooled_spectra(values, costs, 27, per_byte=True)
    kept = [budget // cost for budget, cost in zip(budgets, costs, strict=True)]
    spent = sum(k * cost for k, cost in zip(kept, costs, strict=True))

    def discarded(ranks):
        return sum(float(np.square(v / np.linalg.norm(v))[r:].sum()) for v, r in zip(values, ranks, strict=True))

    best = min(
        discarded((a, b, c)) for a in range(7) for b in range(6) for c in range(5) if 3 * a + 7 * b + 2 * c <= spent
    )
    assert discarded(kept) == pytest.approx(best)


@pytest.mark.parametrize("per_byte", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_guards_and_budget_hold(seed, per_byte):
    rng = np.random.default_rng(seed)
    values = spectra(seed, rng.integers(1, 40, 12))
    costs = [int(cost) for cost in rng.integers(1, 500, 12)]
    sizes = [int(len(v) * cost * rng.uniform(0.5, 1.5)) + 1 for v, cost in zip(values, costs, strict=True)]
    budget = int(rng.uniform(0.3, 1.2) * sum(sizes))
    budgets = pooled_spectra(values, costs, budget, dense_bytes=sizes, least_keep=0.2, most_keep=0.9, per_byte=per_byte)
    for given, size in zip(budgets, sizes, strict=True):
        assert np.ceil(0.2 * size) <= given <= max(int(0.9 * size), np.ceil(0.2 * size))
    assert sum(budgets) == min(budget, sum(max(int(0.9 * size), int(np.ceil(0.2 * size))) for size in sizes))


def test_guards_beyond_the_budget_are_named():
    with pytest.raises(BudgetError, match="smallest shares alone take 40 bytes"):
        pooled_spectra([[1.0, 0.5], [1.0, 0.5]], [50, 50], 30, least_keep=0.2)


def test_zero_matrices_and_empty_pools():
    assert pooled_spectra([], [], 10) == []
    assert pooled_spectra([np.zeros(4), np.ones(4)], [10, 10], 40) == [0, 40]


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="same length"):
        pooled_spectra([[1.0]], [1, 2], 5)
    with pytest.raises(ValueError, match="finite"):
        pooled_spectra([[float("nan")]], [1], 5)
    with pytest.raises(ValueError, match="at least one byte"):
        pooled_spectra([[1.0]], [0], 5)
