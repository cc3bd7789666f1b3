"""Whitening: a root of the Gram and its inverse, also where the Gram is rank-deficient or slightly indefinite."""

import pytest
import torch

from cospadi.solvers.whitening import cholesky_whitening, positive_definite, ridge_whitening


def gram_of(tokens, d, seed):
    x = torch.randn(tokens, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / max(tokens, 1)


@pytest.mark.parametrize("whitening", [cholesky_whitening, lambda g: ridge_whitening(g, 0.0)])
def test_the_root_reproduces_a_definite_gram(whitening):
    gram = gram_of(60, 12, seed=0)
    found = whitening(gram)
    torch.testing.assert_close(found.root.T @ found.root, gram, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.inverse @ found.root, torch.eye(12, dtype=torch.float64))


def test_a_definite_gram_is_left_alone():
    gram = gram_of(60, 12, seed=1)
    same, factor = positive_definite(gram)
    assert torch.equal(same, gram)
    torch.testing.assert_close(factor @ factor.T, gram)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient_grams_get_a_small_ridge(tokens):
    gram = gram_of(tokens, 20, seed=2) - 1e-9 * torch.eye(20, dtype=torch.float64)
    found, factor = positive_definite(gram)
    torch.testing.assert_close(factor @ factor.T, found)
    energy = max(float(gram.diagonal().mean()), 0.0) or 1.0
    assert float((found - gram).abs().max()) <= 1e-5 * energy + 2e-9
    for whitening in (cholesky_whitening(gram), ridge_whitening(gram)):
        torch.testing.assert_close(whitening.root @ whitening.inverse, torch.eye(20, dtype=torch.float64))


def test_an_empty_gram_gives_the_identity():
    found = ridge_whitening(torch.zeros(4, 4))
    assert torch.equal(found.root, torch.eye(4, dtype=torch.float64)) and torch.equal(found.inverse, found.root)
