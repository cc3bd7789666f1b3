"""Linear algebra that the solvers share: each function against a direct computation, and on degenerate input."""

import pytest
import torch

from cospadi.format.patterns import keep_largest
from cospadi.solvers.linalg import MOST_RIDGE, leading_vector, restricted_least_squares, ridged_cholesky
from cospadi.solvers.mod import least_squares_dictionary


def rand(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(d, k, n, seed):
    dictionary, target = rand(d, k, seed=seed), rand(d, n, seed=seed + 100)
    return dictionary.T @ dictionary + 1e-8 * torch.eye(k, dtype=torch.float64), dictionary.T @ target


def objective(gram, products, codes):
    return (codes * (gram @ codes - 2 * products)).sum(0)


def test_ridged_cholesky_adds_the_ridge_asked_for_and_no_more():
    gram, _ = case(30, 8, 1, seed=0)
    eye = torch.eye(8, dtype=torch.float64)
    for ridge in (0.0, 1e-3):
        factor = ridged_cholesky(gram, ridge)
        torch.testing.assert_close(factor @ factor.T, gram + ridge * gram.diagonal().mean() * eye)


def test_ridged_cholesky_survives_an_indefinite_matrix_up_to_rounding():
    vector = rand(40, 1, seed=1)
    gram = vector @ vector.T - 1e-7 * torch.eye(40, dtype=torch.float64)
    factor = ridged_cholesky(gram)
    assert factor.isfinite().all()
    torch.testing.assert_close(factor @ factor.T, gram, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_ridged_cholesky_refuses_what_is_no_gram(bad):
    with pytest.raises(ValueError, match="not positive semi-definite, or holds NaN"):
        ridged_cholesky(torch.full((3, 3), bad, dtype=torch.float64) * (2 + MOST_RIDGE))


@pytest.mark.parametrize("k", [1, 7, 60])
def test_leading_vector_approaches_the_largest_eigenvalue_from_below(k):
    gram, _ = case(80, k, 1, seed=6)
    exact = float(torch.linalg.eigvalsh(gram)[-1])

    def quotient(vector):
        assert float(vector.norm()) == pytest.approx(1)
        return float(vector @ gram @ vector)

    first = leading_vector(gram)
    assert 0.98 * exact <= quotient(first) <= exact * (1 + 1e-12)
    again = leading_vector(gram, first, iterations=200)
    assert quotient(first) <= quotient(again) * (1 + 1e-12)
    assert quotient(again) == pytest.approx(exact, rel=1e-3)


def test_leading_vector_of_zero_is_zero():
    assert not leading_vector(torch.zeros(5, 5)).any()


@pytest.mark.parametrize("dim", [0, 1])
def test_restricted_least_squares_is_exact_given_the_iterations(dim):
    gram, products = case(30, 18, 11, seed=1)
    mask = keep_largest(rand(18, 11, seed=2), 5)
    start = rand(18, 11, seed=3) * mask
    given = (start, mask, products) if dim == 0 else (start.T.contiguous(), mask.T, products.T)
    codes = restricted_least_squares(gram, given[2], given[0], given[1], iterations=30, tolerance=1e-12, dim=dim)
    codes = codes if dim == 0 else codes.T
    for column in range(11):
        chosen = mask[:, column]
        expected = torch.linalg.solve(gram[chosen][:, chosen], products[chosen, column])
        torch.testing.assert_close(codes[chosen, column], expected, rtol=1e-8, atol=1e-8)
        assert (codes[~chosen, column] == 0).all()


def test_restricted_least_squares_never_worsens_and_stops():
    gram, products = case(20, 25, 8, seed=3)
    mask = keep_largest(products, 6)
    start = products * mask
    before = objective(gram, products, start)
    for iterations in (0, 1, 3, 200):
        for tolerance in (0.0, 1e-6):
            codes = restricted_least_squares(gram, products, start, mask, iterations=iterations, tolerance=tolerance)
            assert codes.isfinite().all()
            assert (objective(gram, products, codes) <= before + 1e-9).all()
    solved = restricted_least_squares(gram, products, codes, mask, iterations=5, tolerance=1e-3)
    assert torch.equal(solved, codes)  # below the tolerance a column is left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_dictionary_matches_lstsq(dtype):
    target, codes = rand(8, 40, seed=6), rand(5, 40, seed=7)
    expected = torch.linalg.lstsq(codes.T, target.T).solution.T
    found = least_squares_dictionary(target, codes, ridge=1e-12, dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=1e-5)


def test_atoms_without_codes_fall_back():
    target, codes, old = rand(6, 30, seed=8), rand(4, 30, seed=9), rand(6, 4, seed=10)
    codes[2] = 0
    assert (least_squares_dictionary(target, codes)[:, 2] == 0).all()
    found = least_squares_dictionary(target, codes, fallback=old)
    assert torch.equal(found[:, 2], old[:, 2]) and not torch.equal(found[:, 1], old[:, 1])


def test_codes_that_are_all_zero_give_a_finite_dictionary():
    assert least_squares_dictionary(rand(3, 9, seed=11), torch.zeros(2, 9)).isfinite().all()
