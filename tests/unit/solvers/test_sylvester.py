"""The shared dictionary solves its normal equations, for two Grams exactly, for more by conjugate gradients."""

import pytest
import torch

from cospadi.solvers.sylvester import diagonalise, shared_update, sylvester_update


def positive(n, seed, slope=2.0):
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (rotation * torch.logspace(0, -slope, n, dtype=torch.float64)) @ rotation.T


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diagonalises_both():
    first, second = positive(11, 0), positive(11, 1)
    pencil = diagonalise(first, second)
    v = pencil.vectors
    torch.testing.assert_close(v.T @ first @ v, torch.eye(11, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(v.T @ second @ v, torch.diag(pencil.values), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("d", "k"), [(13, 7), (8, 19), (10, 10)])
def test_stationary(d, k):
    g1, g2, b1, b2 = positive(d, 2), positive(d, 3), positive(k, 4), positive(k, 5)
    right = gaussian(d, k, seed=6)
    dictionary = sylvester_update(diagonalise(g1, g2), diagonalise(b1, b2), right)
    gap = g1 @ dictionary @ b1 + g2 @ dictionary @ b2 - right
    assert float(gap.norm() / right.norm()) < 1e-8


def test_singular_second_matrices():
    d, k = 9, 6
    g1, b1, right = positive(d, 7), positive(k, 8), gaussian(d, k, seed=9)
    half = gaussian(d, 2, seed=10)
    dictionary = sylvester_update(
        diagonalise(g1, half @ half.T), diagonalise(b1, torch.zeros(k, k, dtype=torch.float64)), right
    )
    torch.testing.assert_close(g1 @ dictionary @ b1, right)


def test_minimises_the_two_errors_together():
    d, k, n = 10, 5, 14
    grams = [positive(d, 11), positive(d, 12)]
    weights = [gaussian(d, n, seed=13), gaussian(d, n, seed=14)]
    codes = [gaussian(k, n, seed=15), gaussian(k, n, seed=16)]
    right = sum(g @ w @ c.T for g, w, c in zip(grams, weights, codes, strict=True))
    best = sylvester_update(diagonalise(*grams), diagonalise(*(c @ c.T for c in codes)), right)

    def error(dictionary):
        total = 0.0
        for g, w, c in zip(grams, weights, codes, strict=True):
            e = w - dictionary @ c
            total += float((e * (g @ e)).sum())
        return total

    for seed in range(5):
        step = gaussian(d, k, seed=20 + seed)
        assert error(best) < min(error(best + 1e-3 * step), error(best - 1e-3 * step))


def test_conjugate_gradients_agree_with_the_closed_form():
    d, k = 12, 8
    g, b = [positive(d, 20, 1.0), positive(d, 21, 1.0)], [positive(k, 22, 1.0), positive(k, 23, 1.0)]
    right = gaussian(d, k, seed=24)
    exact = sylvester_update(diagonalise(*g), diagonalise(*b), right)
    iterated = shared_update(g, b, right, torch.zeros_like(right), iterations=200)
    torch.testing.assert_close(iterated, exact, rtol=1e-6, atol=1e-6)


def test_three_grams():
    d, k = 9, 7
    g, b = [positive(d, 30 + i, 1.0) for i in range(3)], [positive(k, 40 + i, 1.0) for i in range(3)]
    right = gaussian(d, k, seed=50)
    dictionary = shared_update(g, b, right, gaussian(d, k, seed=51), iterations=200)
    image = sum(x @ dictionary @ y for x, y in zip(g, b, strict=True))
    assert float((image - right).norm() / right.norm()) < 1e-8


def test_equal_grams_take_one_iteration():
    d, k = 9, 7
    g, b = positive(d, 60), [positive(k, 61 + i) for i in range(4)]
    right = gaussian(d, k, seed=70)
    once = shared_update([g] * 4, b, right, gaussian(d, k, seed=71), iterations=1)
    torch.testing.assert_close(g @ once @ sum(b), right, rtol=1e-6, atol=1e-8)


def test_not_positive_definite():
    with pytest.raises(ValueError, match="not positive semi-definite"):
        diagonalise(-positive(4, 0), positive(4, 1))
