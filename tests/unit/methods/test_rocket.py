"""ROCKET: its importance, its refit, and the optional refinement that chooses the better."""

import pytest
import torch
from dictionary_cases import calibration, decaying, gram, rebuilt, solve

from cospadi.format import pack
from cospadi.methods.rocket import adam_refined
from cospadi.solvers.procrustes import leading_directions
from cospadi.solvers.whitening import cholesky_whitening


def case(d=24, n=37, seed=0, slope=1.5):
    x, w = calibration(300, d, seed=seed, slope=slope), decaying(d, n, seed=seed + 1)
    return x, w, cholesky_whitening(gram(x))


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_support_is_the_published_importance(power):
    x, w, whitening = case()
    spec, factors = solve("rocket", [w], [gram(x)], 0.6, {"importance_power": power})
    codes = factors.codes.matrix.T
    assert ((codes != 0).sum(0) == spec.codes.nonzeros).all()
    assert set(pack(factors.codes, spec.codes)) == {"values", "mask"}
    basis = leading_directions(whitening.apply(w), spec.atoms)
    for column in range(w.shape[1]):
        importance = [
            abs(float(b @ whitening.root @ w[:, column])) * float((whitening.inverse @ b).norm()) ** power
            for b in basis.T
        ]
        best = sorted(range(spec.atoms), key=lambda i: -importance[i])[: spec.codes.nonzeros]
        assert set(best) == set(codes[:, column].nonzero().squeeze(1).tolist())


def test_power_matters():
    x, w, _ = case()
    supports = [solve("rocket", [w], [gram(x)], 0.6, {"importance_power": p})[1].codes.matrix != 0 for p in (0.0, 0.5)]
    assert not torch.equal(*supports)


def test_dictionary_is_the_least_squares_refit():
    x, w, whitening = case(seed=3)
    _, factors = solve("rocket", [w], [gram(x)], 0.6, {"ridge": 1e-12})
    codes = factors.codes.matrix.T
    expected = torch.linalg.lstsq(codes.T, whitening.apply(w).T).solution.T
    torch.testing.assert_close(whitening.apply(factors.dictionary.matrix.T), expected, rtol=1e-5, atol=1e-7)
    norms = expected.norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=1e-5)


def test_reported_error_is_the_output_error():
    x, w, _ = case(seed=5)
    _, factors = solve("rocket", [w], [gram(x)], 0.6, {})
    error = (x @ (w - rebuilt(factors))).square().sum() / (x @ w).square().sum()
    assert factors.info["losses"][-1] == pytest.approx(float(error), rel=1e-6)


def test_more_bytes_less_error():
    x, w, _ = case(seed=7)
    errors = [solve("rocket", [w], [gram(x)], keep, {})[1].info["losses"][-1] for keep in (0.3, 0.5, 0.7, 0.9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.25 * errors[0]


def test_refinement_lowers_both_errors_or_is_refused():
    x, w, _ = case(seed=9, slope=0.3)
    plain = solve("rocket", [w], [gram(x)], 0.5, {})[1]
    refined = solve("rocket", [w], [gram(x)], 0.5, {"refine_steps": 40})[1]
    wild = solve("rocket", [w], [gram(x)], 0.5, {"refine_steps": 3, "learning_rate": 1e3})[1]
    assert torch.equal(refined.codes.matrix != 0, plain.codes.matrix != 0)
    assert (w - rebuilt(refined)).square().sum() < (w - rebuilt(plain)).square().sum()
    assert refined.info["losses"][-1] < 0.98 * plain.info["losses"][-1]
    torch.testing.assert_close(rebuilt(wild), rebuilt(plain))


def test_refinement_follows_the_gradient():
    """One step of Adam from rest moves every entry against the sign of its gradient, by the learning rate."""
    _, w, whitening = case(d=8, n=9, seed=11, slope=0.3)
    generator = torch.Generator().manual_seed(12)
    u = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    v = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    v[v.abs() < 0.5] = 0
    leaves = [u.clone().requires_grad_(), v.clone().requires_grad_()]
    (whitening.root @ (w - leaves[0] @ leaves[1])).square().sum().backward()
    moved = adam_refined(w, whitening, u, v, steps=1, learning_rate=1e-3)
    torch.testing.assert_close(u - moved[0], 1e-3 * leaves[0].grad.sign(), rtol=1e-3, atol=0)
    torch.testing.assert_close(v - moved[1], 1e-3 * leaves[1].grad.sign() * (v != 0), rtol=1e-3, atol=0)


def test_rank_deficient_gram_and_zero_output():
    x, w = calibration(9, 24, seed=13), decaying(24, 30, seed=14)
    w[:, 4] = 0
    _, factors = solve("rocket", [w], [gram(x)], 0.6, {})
    assert (x @ (w - rebuilt(factors))).square().sum() < 0.2 * (x @ w).square().sum()
    assert (rebuilt(factors)[:, 4] == 0).all()
