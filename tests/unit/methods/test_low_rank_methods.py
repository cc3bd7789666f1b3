import dataclasses

import pytest
import torch
from identity_cases import make_problem, output_error, product, rand, round_trip, shape_of

from cospadi.errors import BudgetError, CalibrationError
from cospadi.methods.base import get_method

NAMES = ["svd", "fwsvd", "asvd", "svd_llm", "svd_llm_v2", "basis_sharing"]


def solve(name, problem, budget, **options):
    chosen = get_method(name)
    spec = chosen.spec(shape_of(problem), budget, options)
    return spec, chosen.factorise(problem, spec, options)


def budget_of(problem, rank):
    shape = shape_of(problem)
    return 2 * rank * (shape.d_in + sum(shape.d_out))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(24, (40,)), (33, (7,)), (13, (13,)), (20, (6, 11, 3))])
def test_fits_the_budget_and_survives_storage(name, sizes):
    problem = make_problem(*sizes, seed=1)
    for keep in (0.3, 0.7):
        budget = int(keep * shape_of(problem).dense_bytes)
        spec, factors = solve(name, problem, budget)
        assert budget - 2 * (sizes[0] + sum(sizes[1])) < spec.bytes <= budget
        for kept, read, _ in round_trip(factors, spec):
            torch.testing.assert_close(read, kept, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_rank_deficient_grams(name, tokens):
    problem = make_problem(16, (12,), seed=2, tokens=tokens)
    _, factors = solve(name, problem, budget_of(problem, 12))
    torch.testing.assert_close(product(factors), problem.weights[0], atol=1e-4, rtol=1e-4)  # full rank loses nothing
    _, factors = solve(name, problem, budget_of(problem, 3))
    assert float(factors.dictionary.matrix.abs().max()) < 1e5
    miss = product(factors) - problem.weights[0]
    assert float(miss.norm()) < 100 * float(problem.weights[0].norm())


@pytest.mark.parametrize("name", NAMES)
def test_atoms_have_unit_variance(name):
    problem = make_problem(18, (25,), seed=3)
    _, factors = solve(name, problem, budget_of(problem, 6))
    atoms = factors.dictionary.matrix
    torch.testing.assert_close(torch.einsum("ki,ij,kj->k", atoms, problem.grams[0], atoms), torch.ones(6).double())


@pytest.mark.parametrize("name", ["svd_llm", "svd_llm_v2", "basis_sharing"])
@pytest.mark.parametrize("sizes", [(15, (22,)), (22, (15,)), (12, (5, 9))])
def test_output_error_is_the_truncated_singular_values(name, sizes):
    problem = make_problem(*sizes, seed=4)
    weight = torch.cat(problem.weights, 1)
    root = torch.linalg.cholesky(problem.grams[0]).T
    values = torch.linalg.svdvals(root @ weight)
    for rank in (1, 5, 9):
        _, factors = solve(name, problem, budget_of(problem, rank), ridge=0.0)
        error = output_error(problem, product(factors))
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)


def test_svd_is_blind_and_optimal_in_the_weights():
    problem = make_problem(17, (12,), seed=5)
    _, factors = solve("svd", problem, budget_of(problem, 4))
    values = torch.linalg.svdvals(problem.weights[0])
    error = float((problem.weights[0] - product(factors)).square().sum())
    assert error == pytest.approx(float(values[4:].square().sum()), rel=1e-9)


def test_fwsvd_minimises_the_row_weighted_error():
    problem = make_problem(17, (12,), seed=6)
    _, factors = solve("fwsvd", problem, budget_of(problem, 4))
    scale = problem.fisher[0].sum(1, keepdim=True).sqrt()
    values = torch.linalg.svdvals(scale * problem.weights[0])
    error = float((scale * (problem.weights[0] - product(factors))).square().sum())
    assert error == pytest.approx(float(values[4:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_asvd_minimises_the_error_scaled_by_activations(alpha):
    problem = make_problem(17, (12,), seed=7)
    _, factors = solve("asvd", problem, budget_of(problem, 4), alpha=alpha)
    scale = problem.mean_abs[0][:, None] ** alpha
    values = torch.linalg.svdvals(scale * problem.weights[0])
    error = float((scale * (problem.weights[0] - product(factors))).square().sum())
    assert error == pytest.approx(float(values[4:].square().sum()), rel=1e-9)


def test_knowing_the_inputs_pays():
    problem = make_problem(24, (30,), seed=8)
    errors = {}
    for name in NAMES:
        _, factors = solve(name, problem, budget_of(problem, 8))
        errors[name] = output_error(problem, product(factors))
    assert errors["svd_llm"] < errors["asvd"] < errors["svd"]


def test_sequential_update_makes_good_for_rounding():
    problem = make_problem(20, (30,), seed=9)
    errors = []
    for update in (False, True):
        _, factors = solve("svd_llm", problem, budget_of(problem, 14), sequential_update=update)
        dictionary = factors.dictionary.matrix.bfloat16().double()
        errors.append(output_error(problem, (factors.codes.matrix @ dictionary).T))
    assert torch.equal(dictionary, factors.dictionary.matrix)
    assert errors[1] < errors[0]


def test_shared_basis_of_two_layers_with_their_own_coefficients():
    problem = make_problem(16, (20, 20), seed=10, grams=2)
    budget = budget_of(problem, 6)
    errors = []
    for update in (False, True):
        spec, factors = solve("basis_sharing", problem, budget, update=update, ridge=0.0)
        errors.append(output_error(problem, product(factors)))
    assert factors.dictionary.matrix.shape == (6, 16) and spec.codes.rows == 40
    assert errors[1] < errors[0]
    # each layer's coefficients are the best for this basis under its own inputs
    atoms = factors.dictionary.matrix.T
    for index, weight in enumerate(problem.weights):
        codes = factors.codes.matrix[20 * index : 20 * (index + 1)].T
        gradient = atoms.T @ problem.grams[index] @ (weight - atoms @ codes)
        assert float(gradient.abs().max()) < 1e-6
    # without the update the basis is the SVD of the summed Gram's root times both weights
    summed = dataclasses.replace(problem, grams=(sum(problem.grams) / 2,))
    _, same = solve("svd_llm", summed, budget)
    torch.testing.assert_close(
        product(solve("basis_sharing", problem, budget, update=False)[1]), product(same), atol=1e-8, rtol=1e-8
    )


def test_a_layer_that_saw_no_input_still_follows_its_weights():
    problem = make_problem(16, (9, 9), seed=11, grams=2)
    problem = dataclasses.replace(problem, grams=(problem.grams[0], torch.zeros_like(problem.grams[1])))
    _, factors = solve("basis_sharing", problem, budget_of(problem, 16))
    torch.testing.assert_close(product(factors), torch.cat(problem.weights, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "lacking"), [("fwsvd", "fisher"), ("asvd", "mean_abs")])
def test_missing_statistics_are_named(name, lacking):
    problem = dataclasses.replace(make_problem(8, (8,)), **{lacking: ()})
    with pytest.raises(CalibrationError, match=name):
        solve(name, problem, budget_of(problem, 2))
    assert get_method(name).needs == {lacking}


def test_a_budget_below_one_rank_names_the_least():
    problem = make_problem(8, (8,))
    with pytest.raises(BudgetError, match="at least 32 bytes"):
        solve("svd", problem, 31)


def test_factors_come_in_the_weights_dtype():
    problem = make_problem(9, (7,), dtype=torch.float32)
    _, factors = solve("svd_llm", problem, budget_of(problem, 3))
    assert factors.codes.matrix.dtype == factors.dictionary.matrix.dtype == torch.float32
    weight = rand(9, 7, seed=30)
    assert float((product(factors) - weight).norm()) < float(weight.norm())
