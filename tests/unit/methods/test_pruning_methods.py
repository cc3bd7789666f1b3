import pytest
import torch
from identity_cases import make_problem, output_error, product, round_trip, shape_of

from cospadi.errors import BudgetError, RecipeError
from cospadi.methods.base import GroupShape, get_method

NAMES = ["wanda", "sparsegpt"]


def solve(name, problem, keep=1.0, **options):
    chosen = get_method(name)
    spec = chosen.spec(shape_of(problem), int(keep * shape_of(problem).dense_bytes), options)
    return spec, chosen.factorise(problem, spec, options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "16:32", "5:16"])
@pytest.mark.parametrize("sizes", [(64, (11,)), (45, (6, 9))])
def test_storage_gives_back_the_pattern_and_the_values(name, pattern, sizes):
    problem = make_problem(*sizes, seed=1, dtype=torch.float32)
    spec, factors = solve(name, problem, pattern=pattern)
    for kept, read, part in round_trip(factors, spec):
        torch.testing.assert_close(read, kept, rtol=2**-8, atol=0)
        assert part.pattern == pattern
        assert bool(((read != 0).sum(1) <= part.nonzeros).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_integer_survivors_come_back_exactly(name, bits):
    problem = make_problem(64, (9,), seed=2, dtype=torch.float32)
    spec, factors = solve(name, problem, pattern="16:32", bits=bits, group=8)
    for kept, read, part in round_trip(factors, spec):
        assert torch.equal(kept, read) and part.bits == bits


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_the_plan_takes_the_densest_pattern(keep):
    shape = GroupShape(("a",), 64, (20,))
    budget = int(keep * shape.dense_bytes)
    spec = get_method("wanda").spec(shape, budget, {})
    n = int(spec.codes.pattern.split(":")[0])
    denser = get_method("wanda").spec(shape, shape.dense_bytes * 2, {"pattern": f"{n + 1}:32"})
    assert spec.bytes <= budget < denser.bytes


def test_a_pattern_beyond_the_budget_is_refused():
    shape = GroupShape(("a",), 64, (20,))
    with pytest.raises(BudgetError, match="at least"):
        get_method("sparsegpt").spec(shape, shape.dense_bytes // 2, {"pattern": "2:4"})


@pytest.mark.parametrize("options", [{"pattern": "free"}, {"pattern": "2:5"}, {"pattern": "half"}, {"bits": 14}])
def test_wrong_options_are_refused(options):
    with pytest.raises(RecipeError):
        get_method("wanda").check(options)


@pytest.mark.parametrize("bits", [16, 4])
def test_sparsegpt_beats_wanda(bits):
    problem = make_problem(64, (40,), seed=3)
    errors = [
        output_error(problem, product(solve(name, problem, pattern="2:4", bits=bits, **options)[1]))
        for name, options in (("sparsegpt", {}), ("sparsegpt", {"sweeps": 0, "reorder": False}), ("wanda", {}))
    ]
    assert errors == sorted(errors) and errors[1] < 0.8 * errors[2]


def test_wanda_changes_no_survivor():
    problem = make_problem(32, (10,), seed=4)
    _, factors = solve("wanda", problem)
    matrix = factors.codes.matrix
    assert torch.equal(matrix[factors.codes.support], problem.weights[0].T[factors.codes.support])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_rank_deficient_grams(name, tokens):
    problem = make_problem(40, (8,), seed=5, tokens=tokens)
    spec, factors = solve(name, problem, 0.5)
    for _kept, read, _part in round_trip(factors, spec):
        assert bool(read.isfinite().all())
    assert float(product(factors).norm()) < 3 * float(problem.weights[0].norm())
