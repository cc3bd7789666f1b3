import pytest
import torch
from identity_cases import make_problem, output_error, product, round_trip, shape_of

from cospadi.errors import BudgetError, RecipeError
from cospadi.methods.base import GroupShape, get_method
from cospadi.methods.rtn import rtn

SHAPES = [(64, (20,)), (37, (5, 12)), (130, (3,))]


def solve(name, problem, keep, **options):
    chosen = get_method(name)
    spec = chosen.spec(shape_of(problem), int(keep * shape_of(problem).dense_bytes), options)
    return spec, chosen.factorise(problem, spec, options)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False, None])
def test_storage_gives_back_exactly_the_matrix(name, sizes, bits, symmetric):
    problem = make_problem(*sizes, seed=bits, dtype=torch.float32)
    spec, factors = solve(name, problem, 0.9, bits=bits, group=16, symmetric=symmetric)
    assert spec.codes.bits == bits and spec.dictionary is None
    assert spec.codes.symmetric == (bits == 8 if symmetric is None else symmetric)
    for kept, read, _ in round_trip(factors, spec):
        assert torch.equal(kept, read)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False, None])
def test_half_steps_give_back_exactly_the_matrix(name, sizes, bits, symmetric):
    problem = make_problem(*sizes, seed=bits, dtype=torch.float32)
    spec, factors = solve(name, problem, 0.9, bits=bits, group=16, symmetric=symmetric, half=True, search=8)
    assert spec.codes.half == (bits < 8 or symmetric is not None)
    for kept, read, part in round_trip(factors, spec):
        assert torch.equal(kept, read)
        if symmetric and spec.codes.half:
            odd = 2 * kept / factors.codes.scales.repeat_interleave(16, 1)[:, : part.columns]
            assert bool((odd.round() % 2 == 1).all())  # no level is zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_steps_pay_at_few_bits(symmetric):
    errors = {}
    for half in (False, True):
        problem = make_problem(64, (60,), seed=31)
        _, factors = solve("rtn", problem, 0.5, bits=2, group=32, symmetric=symmetric, half=half, search=30)
        errors[half] = float((product(factors) - torch.cat(problem.weights, 1)).square().mean())
    assert errors[True] < 0.95 * errors[False]


def test_the_plan_takes_the_most_bits_then_the_smallest_groups():
    shape = GroupShape(("a",), 512, (256,))
    chosen = get_method("rtn")
    last = None
    for keep in (0.14, 0.16, 0.2, 0.22, 0.27, 0.4, 0.507, 0.52, 0.9):
        spec = chosen.spec(shape, int(keep * shape.dense_bytes), {})
        assert spec.bytes <= keep * shape.dense_bytes
        size = (spec.codes.bits, -(spec.codes.group or 512))
        assert last is None or size >= last
        last = size
    assert last == (8, -64)
    assert chosen.spec(shape, int(0.27 * shape.dense_bytes), {}).codes.bits == 4
    coarse = chosen.spec(shape, int(0.507 * shape.dense_bytes), {}).codes
    assert (coarse.bits, coarse.group) == (8, 256)


def test_too_small_a_budget_names_the_least():
    shape = GroupShape(("a",), 512, (256,))
    with pytest.raises(BudgetError, match="at least"):
        get_method("gptq").spec(shape, shape.dense_bytes // 10, {})
    with pytest.raises(BudgetError, match="at least"):
        get_method("gptq").spec(shape, shape.dense_bytes // 3, {"bits": 8})


@pytest.mark.parametrize("options", [{"bits": 5}, {"group": -1}, {"gruop": 4}])
def test_wrong_options_are_refused(options):
    with pytest.raises(RecipeError):
        get_method("gptq").check(options)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_pays(bits):
    problem = make_problem(96, (40,), seed=20 + bits)
    errors = []
    for name, options in (("rtn", {}), ("gptq", {"search": 0, "sweeps": 0}), ("gptq", {})):
        _, factors = solve(name, problem, 0.5, bits=bits, group=32, **options)
        errors.append(output_error(problem, product(factors)))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < errors[1]


def test_asymmetric_grids_pay_at_few_bits():
    problem = make_problem(64, (60,), seed=24)
    errors = [
        output_error(problem, product(solve("gptq", problem, 0.5, bits=2, group=32, symmetric=symmetric)[1]))
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_rtn_does_not_look_at_the_inputs():
    one, other = make_problem(20, (9,), seed=25), make_problem(20, (9,), seed=25, tokens=3)
    spec, factors = solve("rtn", one, 0.5)
    assert torch.equal(factors.codes.matrix, rtn(other, spec).codes.matrix)


def test_modules_with_their_own_grams_are_solved_apart():
    both = make_problem(32, (10, 14), seed=26, grams=2)
    _, factors = solve("gptq", both, 0.4)
    rows = factors.codes.matrix.split([10, 14])
    for index in range(2):
        alone = type(both)("one", both.weights[index : index + 1], both.grams[index : index + 1])
        _, single = solve("gptq", alone, 0.4)
        assert torch.equal(single.codes.matrix, rows[index])


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_rank_deficient_grams(tokens):
    problem = make_problem(30, (8,), seed=27, tokens=tokens)
    _, factors = solve("gptq", problem, 0.6, bits=4, group=16)
    assert float((product(factors) - problem.weights[0]).norm()) < 0.3 * float(problem.weights[0].norm())


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("grams", [1, 2])
@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_and_scales_fitted_to_the_gram(sizes, grams, bits):
    problem = make_problem(*sizes, seed=bits, grams=min(grams, len(sizes[1])), dtype=torch.float32)
    spec, plain = solve("gptq", problem, 0.9, bits=bits, group=16, shifts=0, rescale=0)
    same, fitted = solve("gptq", problem, 0.9, bits=bits, group=16, shifts=1, rescale=3)
    assert same == spec
    assert output_error(problem, product(fitted)) < output_error(problem, product(plain))
    for kept, read, _ in round_trip(fitted, spec):
        assert torch.equal(kept, read)
