"""COMPOT: orthonormal whitened dictionary, an error that never rises, budgets beyond d_in atoms."""

import pytest
import torch
from dictionary_cases import calibration, decaying, gram, rebuilt, solve

from cospadi.format import pack
from cospadi.methods.base import GroupShape, get_method
from cospadi.solvers.whitening import cholesky_whitening


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dictionary_is_orthonormal_in_whitened_space(dtype):
    x, w = calibration(300, 24, seed=0, slope=1.0), decaying(24, 37, seed=1).to(dtype)
    spec, factors = solve("compot", [w], [gram(x)], 0.6, {})
    whitened = cholesky_whitening(gram(x)).apply(factors.dictionary.matrix.T)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(
        whitened.T @ whitened, torch.eye(spec.atoms, dtype=dtype), rtol=tolerance, atol=tolerance
    )
    assert set(pack(factors.codes, spec.codes)) == {"values", "mask"}


def test_more_rounds_are_never_worse_and_the_error_is_the_output_error():
    x, w = calibration(300, 32, seed=2), decaying(32, 48, seed=3)
    errors = []
    for rounds in (0, 1, 5, 20):
        _, factors = solve("compot", [w], [gram(x)], 0.6, {"rounds": rounds})
        error = (x @ (w - rebuilt(factors))).square().sum() / (x @ w).square().sum()
        assert factors.info["losses"][-1] == pytest.approx(float(error), rel=1e-6)
        errors.append(float(error))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_budget_beyond_d_in_atoms_goes_to_nonzeros():
    method = get_method("compot")
    shape = GroupShape(("gate",), 32, (200,))
    budget = int(0.85 * shape.dense_bytes)
    spec = method.spec(shape, budget, {"rho": 2.0})
    assert spec.atoms == 32 and spec.codes.nonzeros > 16
    assert budget - 2 * 200 - 4 * 200 < spec.bytes <= budget
    below = method.spec(shape, int(0.4 * shape.dense_bytes), {"rho": 2.0})
    assert below.atoms < 32 and abs(below.codes.nonzeros - below.atoms / 2) <= 2


def test_clipped_plan_solves():
    x, w = calibration(200, 12, seed=4), decaying(12, 90, seed=5)
    spec, factors = solve("compot", [w], [gram(x)], 0.8, {})
    assert spec.atoms == 12
    assert (x @ (w - rebuilt(factors))).square().sum() < 0.05 * (x @ w).square().sum()


def test_siblings_are_solved_side_by_side():
    x, w = calibration(200, 16, seed=6), decaying(16, 40, seed=7)
    together = solve("compot", [w[:, :25], w[:, 25:]], [gram(x)], 0.6, {})[1]
    torch.testing.assert_close(rebuilt(together), rebuilt(solve("compot", [w], [gram(x)], 0.6, {})[1]))


def test_rank_deficient_gram():
    x, w = calibration(9, 24, seed=8), decaying(24, 30, seed=9)
    _, factors = solve("compot", [w], [gram(x)], 0.6, {})
    assert (x @ (w - rebuilt(factors))).square().sum() < 0.1 * (x @ w).square().sum()
