import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

import cospadi.allocation.multiple_choice as module
from cospadi.allocation import Candidate, knapsack, smallest_cap
from cospadi.errors import BudgetError


def random_options(rng, groups, most, sizes=60):
    return [
        [Candidate(int(rng.integers(0, sizes)), float(rng.normal())) for _ in range(rng.integers(1, most + 1))]
        for _ in range(groups)
    ]


def totals(options, choice):
    picked = [group[index] for group, index in zip(options, choice, strict=True)]
    return sum(option.bytes for option in picked), sum(option.loss for option in picked)


def curves(rng, groups, count):
    """Options as a compressor meets them: loss falls with bytes, by very different amounts."""
    options = []
    for _ in range(groups):
        size, power, height = int(rng.choice([2**21, 2**23, 7 * 2**22])), rng.uniform(0.5, 3.5), np.exp(rng.normal())
        options.append(
            [
                Candidate(int(keep * size), float(height * (1 - keep) ** power * rng.uniform(1, 1.05)))
                for keep in rng.random(count)
            ]
        )
    return options


@pytest.mark.parametrize("seed", range(150))
def test_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    options = random_options(rng, rng.integers(1, 6), 5)
    least, most = (sum(pick(o.bytes for o in group) for group in options) for pick in (min, max))
    for budget in {least, most, *(int(b) for b in rng.integers(least, most + 1, 3))}:
        best = min(
            totals(options, choice)[1]
            for choice in itertools.product(*(range(len(group)) for group in options))
            if totals(options, choice)[0] <= budget
        )
        spent, loss = totals(options, knapsack(options, budget))
        assert spent <= budget
        assert loss == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_equals_an_integer_programme(seed):
    rng = np.random.default_rng(seed)
    options = random_options(rng, 25, 8, 500)
    budget = int(1.6 * sum(min(o.bytes for o in group) for group in options)) + 50
    flat = [(g, option) for g, group in enumerate(options) for option in group]
    owner = np.array([[float(g == row) for g, _ in flat] for row in range(25)])
    size = np.array([[float(option.bytes) for _, option in flat]])
    found = milp(
        np.array([option.loss for _, option in flat]),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(owner, 1, 1), LinearConstraint(size, -np.inf, budget)],
        options={"mip_rel_gap": 0.0},
    )
    spent, loss = totals(options, knapsack(options, budget))
    assert spent <= budget and loss == pytest.approx(float(found.fun), abs=1e-6)


def relaxed_bound(options, budget, multipliers=4000):
    """A lower bound by weak duality, from a scan of multipliers."""
    top = max(abs(o.loss) for group in options for o in group)
    best = -np.inf
    for multiplier in np.geomspace(1e-12, 1e-3, multipliers) * top:
        value = sum(min(o.loss + multiplier * o.bytes for o in group) for group in options) - multiplier * budget
        best = max(best, value)
    return best


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_a_model_of_224_groups_and_60_options(keep):
    options = curves(np.random.default_rng(5), 224, 60)
    budget = int(keep * sum(max(o.bytes for o in group) for group in options))
    choice = knapsack(options, budget)
    spent, loss = totals(options, choice)
    assert spent <= budget
    bound = relaxed_bound(options, budget, 300)
    assert bound - 1e-9 <= loss <= bound * 1.001
    assert choice == knapsack(options, budget)


def test_thinned_states_still_give_a_good_solution(monkeypatch):
    options = curves(np.random.default_rng(6), 120, 12)
    budget = sum(max(o.bytes for o in group) for group in options) // 2
    _, best = totals(options, knapsack(options, budget))
    monkeypatch.setattr(module, "MOST_STATES", 5)
    spent, loss = totals(options, knapsack(options, budget))
    assert spent <= budget and best <= loss <= 1.01 * best


def test_a_cap_guards_every_group():
    options = [[Candidate(1, 5.0), Candidate(10, 0.0)], [Candidate(1, 1.0), Candidate(9, 0.5)]]
    assert knapsack(options, 10) == [0, 1]
    assert knapsack(options, 11) == [1, 0]
    assert knapsack(options, 11, cap=4.0) == [1, 0]
    with pytest.raises(BudgetError, match="under the loss cap is 11 bytes"):
        knapsack(options, 10, cap=4.0)
    assert knapsack(options, 19, cap=[9.0, 0.1]) == [1, 1]  # nothing meets 0.1: the best stays
    with pytest.raises(ValueError, match="caps"):
        knapsack(options, 19, cap=[1.0])


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_cap_is_feasible_and_smallest(seed):
    rng = np.random.default_rng(seed)
    options = random_options(rng, 4, 4)
    least = sum(min(o.bytes for o in group) for group in options)
    budget = least + int(rng.integers(0, 60))
    worst = min(
        max(group[i].loss for group, i in zip(options, choice, strict=True))
        for choice in itertools.product(*(range(len(group)) for group in options))
        if totals(options, choice)[0] <= budget
    )
    cap = smallest_cap(options, budget)
    assert cap == worst
    assert max(g[i].loss for g, i in zip(options, knapsack(options, budget, cap=cap), strict=True)) <= cap


def test_impossible_budgets_name_the_least():
    options = [[Candidate(1500, 1.0), Candidate(2000, 0.0)], [Candidate(10, 0.0)]]
    for choose in (knapsack, smallest_cap):
        with pytest.raises(BudgetError, match="1,510 bytes, the budget is 1,509"):
            choose(options, 1509)
    assert knapsack(options, 1510) == [0, 0]


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="group 1 has no option"):
        knapsack([[Candidate(1, 1.0)], []], 10)
    for option in (Candidate(-1, 1.0), Candidate(1, float("nan")), Candidate(1, float("inf"))):
        with pytest.raises(ValueError, match="group 0"):
            knapsack([[option]], 10)
    assert knapsack([], 0) == []
