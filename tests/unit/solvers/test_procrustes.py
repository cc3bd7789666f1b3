"""Orthonormal dictionaries: exact steps, orthonormality, an error that never rises."""

from itertools import pairwise

import pytest
import torch

from cospadi.solvers.procrustes import leading_directions, orthonormal_codes, polar_factor, procrustes


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(n):
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize(("d", "n", "k", "s"), [(20, 33, 20, 7), (31, 12, 9, 4), (16, 50, 11, 11)])
def test_error_never_rises_and_atoms_are_orthonormal(d, n, k, s):
    target = gaussian(d, n, seed=d)
    dictionary, codes, losses = procrustes(target, k, s, rounds=12)
    torch.testing.assert_close(dictionary.T @ dictionary, identity(k))
    assert ((codes != 0).sum(0) == s).all()
    assert losses[-1] == pytest.approx(float((target - dictionary @ codes).square().sum()))
    assert all(later <= earlier * (1 + 1e-10) for earlier, later in pairwise(losses))
    assert len(losses) == 13
    if s < k:
        assert losses[-1] < 0.98 * losses[0]


def test_starts_at_the_truncated_svd():
    target = gaussian(14, 20)
    _, _, losses = procrustes(target, 5, 5, rounds=0)
    assert losses == [pytest.approx(float(torch.linalg.svdvals(target)[5:].square().sum()))]


def test_leading_directions_are_singular_vectors():
    target = gaussian(13, 9)
    u = torch.linalg.svd(target, full_matrices=False)[0]
    cosines = (leading_directions(target, 6).T @ u[:, :6]).abs()
    torch.testing.assert_close(cosines, identity(6), atol=1e-8, rtol=0)


@pytest.mark.parametrize("power", [0, 3, 9])
def test_polar_factor_maximises_the_inner_product(power):
    u, v = torch.linalg.qr(gaussian(18, 7))[0], torch.linalg.qr(gaussian(7, 7, seed=1))[0]
    singular = torch.logspace(0, -power, 7, dtype=torch.float64)  # 1e-9 takes the way through the SVD
    matrix = (u * singular) @ v.T
    polar = polar_factor(matrix)
    torch.testing.assert_close(polar.T @ polar, identity(7))
    assert float((polar * matrix).sum()) == pytest.approx(float(singular.sum()), rel=1e-10)


def test_polar_factor_of_a_rank_deficient_matrix():
    matrix = gaussian(15, 3) @ gaussian(3, 8, seed=1)
    polar = polar_factor(matrix)
    torch.testing.assert_close(polar.T @ polar, identity(8))
    assert float((polar * matrix).sum()) == pytest.approx(float(torch.linalg.svdvals(matrix).sum()))


def test_codes_are_optimal_for_their_dictionary():
    dictionary = torch.linalg.qr(gaussian(6, 6))[0]
    target = gaussian(6, 4, seed=2)
    codes = orthonormal_codes(dictionary, target, 2)
    best = torch.full((4,), torch.inf, dtype=torch.float64)
    for i in range(6):
        for j in range(i):
            part = dictionary[:, [i, j]]
            best = torch.minimum(best, (target - part @ (part.T @ target)).square().sum(0))
    torch.testing.assert_close((target - dictionary @ codes).square().sum(0), best)


def test_too_many_atoms():
    with pytest.raises(ValueError, match="7 atoms of 6 entries"):
        procrustes(gaussian(6, 9), 7, 2)
