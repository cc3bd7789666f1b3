import pytest
import torch

from cospadi.solvers.low_rank import (
    eigen_whitening,
    fit_codes,
    left_singular,
    spectrum,
    truncated,
    unit_variance,
    weighted,
    whitened,
)
from cospadi.solvers.whitening import cholesky_whitening

SHAPES = [(17, 5), (5, 17), (12, 12), (1, 9), (9, 1)]


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs):
    return inputs.T @ inputs / inputs.shape[0]


def output_error(gram, weight, dictionary, codes):
    miss = weight - dictionary @ codes
    return float((miss * (gram @ miss)).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_and_vectors_match_a_full_svd(shape):
    matrix = rand(*shape, seed=1)
    vectors, values = left_singular(matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(min(shape), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(vectors @ (vectors.T @ matrix), matrix)
    torch.testing.assert_close(spectrum(matrix), values)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_reaches_the_bound_of_eckart_and_young(shape):
    matrix = rand(*shape, seed=2)
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape) + 1):
        vectors, codes = truncated(matrix, rank)
        assert vectors.shape == (shape[0], rank)
        assert float((matrix - vectors @ codes).square().sum()) == pytest.approx(
            float(values[rank:].square().sum()), abs=1e-10
        )


@pytest.mark.parametrize("rank", [0, 6])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match="not possible"):
        truncated(rand(5, 7), rank)


def test_a_matrix_of_low_rank_is_reproduced():
    matrix = rand(20, 3, seed=3) @ rand(3, 11, seed=4)
    vectors, codes = truncated(matrix, 3)
    torch.testing.assert_close(vectors @ codes, matrix)
    vectors, codes = truncated(matrix, 8)  # beyond the rank
    torch.testing.assert_close(vectors @ codes, matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("root", [cholesky_whitening, lambda g: eigen_whitening(g, 0.0)])
def test_truncated_singular_values_are_the_output_error(root):
    gram, weight = gram_of(rand(90, 13, seed=5) @ rand(13, 13, seed=6)), rand(13, 21, seed=7)
    whitening = root(gram)
    values = spectrum(whitening.apply(weight))
    for rank in (1, 4, 12):
        error = output_error(gram, weight, *whitened(weight, whitening, rank))
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)


def test_eigen_whitening_is_a_root_and_survives_rank_deficiency():
    gram = gram_of(rand(30, 8, seed=8))
    whitening = eigen_whitening(gram)
    torch.testing.assert_close(whitening.root.T @ whitening.root, gram)
    torch.testing.assert_close(whitening.inverse @ whitening.root, torch.eye(8, dtype=torch.float64))
    poor = gram_of(rand(3, 8, seed=9))
    whitening = eigen_whitening(poor)
    torch.testing.assert_close(whitening.root @ whitening.inverse, torch.eye(8, dtype=torch.float64))
    assert torch.equal(eigen_whitening(torch.zeros(4, 4)).root, torch.eye(4, dtype=torch.float64))


def test_weighted_svd_minimises_the_weighted_error():
    weight, scale = rand(10, 14, seed=10), rand(10, seed=11).abs() + 0.1
    values = torch.linalg.svdvals(scale[:, None] * weight)
    dictionary, codes = weighted(weight, scale, 4)
    error = float((scale[:, None] * (weight - dictionary @ codes)).square().sum())
    assert error == pytest.approx(float(values[4:].square().sum()), rel=1e-9)
    plain = truncated(weight, 4)
    assert error < float((scale[:, None] * (weight - plain[0] @ plain[1])).square().sum())


@pytest.mark.parametrize("scale", [torch.zeros(6), torch.tensor([0.0, 1, 2, 0, 1, 3])])
def test_weighted_svd_bounds_what_zero_weights_would_blow_up(scale):
    weight = rand(6, 6, seed=12)
    dictionary, codes = weighted(weight, scale, 6)
    torch.testing.assert_close(dictionary @ codes, weight, atol=1e-7, rtol=1e-7)


def test_fitted_codes_satisfy_the_normal_equations():
    gram, weight, dictionary = gram_of(rand(50, 9, seed=13)), rand(9, 7, seed=14), rand(9, 4, seed=15)
    codes = fit_codes(dictionary, weight, gram)
    gradient = dictionary.T @ gram @ (weight - dictionary @ codes)
    assert float(gradient.abs().max()) < 1e-7
    best = output_error(gram, weight, dictionary, codes)
    for seed in range(3):
        assert output_error(gram, weight, dictionary, codes + 0.01 * rand(4, 7, seed=seed)) > best


def test_fitted_codes_survive_dependent_atoms_and_empty_grams():
    gram, weight = gram_of(rand(50, 9, seed=16)), rand(9, 7, seed=17)
    dictionary = rand(9, 2, seed=18).repeat(1, 2)
    codes = fit_codes(dictionary, weight, gram)
    alone = fit_codes(dictionary[:, :2], weight, gram)
    torch.testing.assert_close(dictionary @ codes, dictionary[:, :2] @ alone, atol=1e-6, rtol=1e-6)
    assert not fit_codes(dictionary, weight, torch.zeros(9, 9)).any()
    with pytest.raises(ValueError, match="positive semi-definite"):
        fit_codes(rand(9, 3), weight, torch.diag(torch.tensor([10.0] + [-1.0] * 8)))


def test_unit_variance_keeps_the_product():
    gram, dictionary, codes = gram_of(rand(40, 6, seed=19)), rand(6, 4, seed=20), rand(4, 5, seed=21)
    dictionary[:, 2] = 0
    scaled, rest = unit_variance(dictionary, codes, gram)
    torch.testing.assert_close(scaled @ rest, dictionary @ codes)
    energy = (scaled * (gram @ scaled)).sum(0)
    torch.testing.assert_close(energy, torch.tensor([1.0, 1, 0, 1], dtype=torch.float64))


def test_unit_variance_bounds_atoms_that_no_input_excites():
    gram = torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
    scaled, _ = unit_variance(torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), gram)
    assert float(scaled.abs().max()) < 1200
