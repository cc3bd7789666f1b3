"""Hard-thresholding pursuit: supports, least squares on them, an error that falls."""

from itertools import combinations, pairwise

import pytest
import torch

from cospadi.format.patterns import keep_largest
from cospadi.solvers.htp import dense_codes, htp


def case(d, k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(d, k, generator=generator, dtype=torch.float64)
    target = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return dictionary.T @ dictionary + 1e-8 * torch.eye(k, dtype=torch.float64), dictionary.T @ target


def objective(gram, products, codes):
    return (codes * (gram @ codes - 2 * products)).sum(0)


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_error_falls_with_every_step(pattern):
    gram, products = case(40, 30, 25, seed=0)
    codes = htp(gram, products, torch.zeros_like(products), 9, pattern=pattern, steps=1, iterations=1)
    errors = [objective(gram, products, codes)]
    for _ in range(6):
        codes = htp(gram, products, codes, 9, pattern=pattern, steps=1, iterations=1)
        errors.append(objective(gram, products, codes))
        assert (codes != 0).equal(keep_largest(codes, 9, pattern))
    assert all((later <= earlier + 1e-9).all() for earlier, later in pairwise(errors))
    assert errors[-1].sum() < errors[0].sum() * 1.02  # objectives are negative


def test_zero_column_stays_zero():
    gram, products = case(20, 12, 5, seed=4)
    products[:, 2] = 0
    codes = htp(gram, products, dense_codes(gram, products), 4)
    assert codes.isfinite().all() and (codes[:, 2] == 0).all()


def test_finds_the_best_support_where_atoms_are_nearly_orthogonal():
    generator = torch.Generator().manual_seed(5)
    dictionary = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))[0]
    dictionary += 0.01 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    gram, products = dictionary.T @ dictionary, torch.randn(9, 12, generator=generator, dtype=torch.float64)
    codes = htp(gram, products, dense_codes(gram, products), 3, steps=4, iterations=20, tolerance=1e-12)
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for chosen in combinations(range(9), 3):
        index = list(chosen)
        explained = products[index] * torch.linalg.solve(gram[index][:, index], products[index])
        best = torch.minimum(best, -explained.sum(0))
    found = objective(gram, products, codes)
    assert (found <= best * 0.99).all()
    assert torch.isclose(found, best).double().mean() >= 0.75


def test_dense_codes():
    gram, products = case(30, 12, 6, seed=7)
    torch.testing.assert_close(gram @ dense_codes(gram, products), products)
