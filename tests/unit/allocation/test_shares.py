import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from cospadi.allocation import theoretical_loss, truncation_loss
from cospadi.allocation.shares import apportion, exact_keep
from cospadi.errors import BudgetError


@pytest.mark.parametrize("keep", [0.01, 0.29, 1 / 3, 0.6, 0.999, 1.0])
def test_apportioned_shares_are_whole_and_sum_to_the_total(keep):
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 10**9, 50)] + [1, 1, 2]
    exact = exact_keep(keep)
    total = math.floor(exact * sum(sizes))
    budgets = apportion([exact * size for size in sizes], total)
    assert sum(budgets) == total
    assert all(abs(budget - exact * size) < 1 for budget, size in zip(budgets, sizes, strict=True))
    assert all(0 <= budget <= size for budget, size in zip(budgets, sizes, strict=True))


def test_keep_is_read_as_written():
    assert math.floor(0.29 * 100) == 28  # what binary fractions would give
    assert math.floor(exact_keep(0.29) * 100) == 29


def test_apportion_respects_upper_limits():
    assert apportion([], 0) == []
    assert apportion([Fraction(1, 2), Fraction(3, 2)], 2) == [1, 1]
    assert apportion([Fraction(1, 2), Fraction(3, 2)], 2, most=[0, 4]) == [0, 2]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_keep_out_of_range_is_refused(keep):
    with pytest.raises(BudgetError, match=r"\(0, 1\]"):
        exact_keep(keep)


def test_truncation_loss_is_the_norm_of_the_tail():
    assert truncation_loss([5.0, 4.0, 3.0, 0.0], 1) == 5.0
    assert truncation_loss([5.0, 4.0], 2) == 0.0


def test_theoretical_loss_follows_the_formula_within_a_kind():
    losses, sizes, kinds = [4.0, 8.0, 32.0, 5.0], [1000, 1000, 1000, 600], ["q", "q", "q", "o"]
    budgets = theoretical_loss(losses, sizes, kinds, 0.6)
    assert sum(budgets) == 2160
    assert budgets[3] == 360
    inverse = [1 / math.log(loss) for loss in losses[:3]]
    removed = [1200 * part / sum(inverse) for part in inverse]
    assert budgets[:3] == pytest.approx([1000 - gone for gone in removed], abs=1)


def test_theoretical_loss_takes_the_logarithm_of_the_loss_itself():
    budgets = theoretical_loss([math.e**2, math.e**4], [1000, 1000], ["q", "q"], 0.7)
    assert budgets == [600, 800]  # removed 2 : 1, as 1/2 is to 1/4
    larger = theoretical_loss([math.e**6, math.e**8], [1000, 1000], ["q", "q"], 0.7)
    assert larger == pytest.approx([1000 - 600 * 4 / 7, 1000 - 600 * 3 / 7], abs=1)


@pytest.mark.parametrize("small", [0.0, 0.5, 1.0, 2.0, math.e])
def test_theoretical_loss_is_uniform_where_a_loss_is_too_small_for_the_formula(small):
    with pytest.warns(UserWarning, match=r"^q: a theoretical loss of .* equal shares$"):
        budgets = theoretical_loss([small, 50.0, 20.0], [1000, 1000, 1000], ["q", "q", "o"], 0.6)
    assert budgets == [600, 600, 600]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.8, 1.0])
def test_theoretical_loss_keeps_to_sum_and_guards(keep):
    rng = np.random.default_rng(1)
    losses = [*np.exp(1.5 + np.abs(rng.normal(size=40)) * 3), 1e9]
    sizes = [int(size) for size in rng.integers(1000, 10**6, 41)]
    kinds = [int(kind) for kind in rng.integers(0, 4, 41)]
    budgets = theoretical_loss(losses, sizes, kinds, keep, least_keep=0.07)
    assert sum(budgets) == math.floor(Fraction(repr(keep)) * sum(sizes))
    for budget, size in zip(budgets, sizes, strict=True):
        assert 0.07 * size - 1 <= budget <= size
    for kind in set(kinds):
        mine = [i for i in range(41) if kinds[i] == kind]
        kept = sum(budgets[i] for i in mine)
        assert kept == pytest.approx(keep * sum(sizes[i] for i in mine), abs=len(mine) + 1)
        ranked = sorted(mine, key=lambda i: losses[i])
        shares = [budgets[i] / sizes[i] for i in ranked]
        assert all(b >= a - 2e-3 for a, b in pairwise(shares))


def test_theoretical_loss_refuses_nonsense():
    with pytest.raises(ValueError, match="sizes"):
        theoretical_loss([1.0], [1, 2], ["a"], 0.5)
    for loss in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            theoretical_loss([loss], [10], ["a"], 0.5)
    with pytest.raises(BudgetError):
        theoretical_loss([1.0], [10], ["a"], 1.5)
