"""Scales fitted to chosen integers."""

import pytest
import torch

from cospadi.format.pack import integer_range
from cospadi.solvers.feedback import damped
from cospadi.solvers.quantise import bfloat16_exact, quantise_rows
from cospadi.solvers.rescale import rescaled


def case(seed, rows=11, columns=50, tokens=80):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, columns)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = x @ (torch.eye(columns, dtype=torch.float64) + mix)
    return torch.randn(rows, columns, generator=generator), x.T @ x / tokens


def losses(rows, matrix, hessian):
    errors = (rows - matrix).double()
    return ((errors @ hessian) * errors).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("group", [0, 16, 50])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_row_gets_worse_and_all_stay_on_the_grid(bits, group, symmetric):
    rows, gram = case(bits + group)
    start = quantise_rows(rows, bits=bits, group=group, symmetric=symmetric, hessian=gram, search=10, sweeps=2)
    found = rescaled(rows, start, bits=bits, group=group, hessian=gram, rounds=3)
    hessian = damped(gram, 0.01)
    before, after = losses(rows, start.matrix, hessian), losses(rows, found.matrix, hessian)
    assert bool((after <= before * (1 + 1e-5)).all())
    size = group or 50
    scales = found.scales.repeat_interleave(size, 1)[:, :50]
    zeros = 0 if symmetric else start.zeros.repeat_interleave(size, 1)[:, :50]
    integers = found.matrix / scales + zeros
    assert torch.allclose(integers, integers.round(), atol=1e-3)
    low, high = integer_range(bits, symmetric)
    assert low - 1e-3 <= float(integers.min()) <= float(integers.max()) <= high + 1e-3
    assert torch.equal(found.scales, bfloat16_exact(found.scales))
    assert (found.zeros is None) == symmetric


def test_two_bits_gain_several_per_cent():
    rows, gram = case(1, rows=64, columns=128, tokens=300)
    start = quantise_rows(rows, bits=2, group=32, symmetric=False, hessian=gram, search=30, sweeps=2)
    found = rescaled(rows, start, bits=2, group=32, hessian=gram, rounds=4)
    before, after = (float(losses(rows, item.matrix, gram).sum()) for item in (start, found))
    assert after < 0.97 * before


def test_one_round_solves_the_normal_equations_of_the_scales(monkeypatch):
    """Without the pass over the integers, scales are those of plain least squares, up to bfloat16."""
    import cospadi.solvers.rescale as module

    rows, gram = case(9, rows=5, columns=24)
    monkeypatch.setattr(module, "refine", lambda rows, matrix, *_, **__: matrix)
    monkeypatch.setattr(module, "bfloat16_exact", lambda values: values)
    start = quantise_rows(rows, bits=3, group=8, symmetric=True, hessian=gram)
    found = rescaled(rows, start, bits=3, group=8, hessian=gram, rounds=1, damping=0.02)
    root = torch.linalg.cholesky(damped(gram, 0.02)).T
    for row in range(5):
        integers = (start.matrix[row] / start.scales[row].repeat_interleave(8)).round().double()
        basis = torch.block_diag(*[part[:, None] for part in integers.split(8)])
        expected = torch.linalg.lstsq(root @ basis, root @ rows[row].double()[:, None]).solution[:, 0]
        if bool((expected > 0).all()):
            assert torch.allclose(found.scales[row].double(), expected, rtol=1e-3)
    assert not torch.equal(found.scales, start.scales)


def test_groups_of_zeros_are_left_alone():
    rows, gram = case(4, columns=32)
    rows[:, :16] = 0
    start = quantise_rows(rows, bits=2, group=16, symmetric=False, hessian=None)
    found = rescaled(rows, start, bits=2, group=16, hessian=gram, rounds=2)
    assert bool(found.matrix.isfinite().all())
    assert bool(found.scales.isfinite().all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_symmetric_grids_in_half_steps_get_better_and_stay_on_the_grid(bits, group):
    rows, gram = case(bits + group)
    rows[3] = 0
    start = quantise_rows(rows, bits=bits, group=group, half=True, hessian=gram, search=10, sweeps=2)
    found = rescaled(rows, start, bits=bits, group=group, hessian=gram, rounds=3, half=True)
    assert found.zeros is None and not found.matrix[3].any()
    hessian = damped(gram, 0.01)
    before, after = losses(rows, start.matrix, hessian), losses(rows, found.matrix, hessian)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert bits > 4 or after.sum() < 0.999 * before.sum()
    scales = found.scales.repeat_interleave(group or 50, 1)[:, :50]
    places = (found.matrix / scales)[scales > 0] + (2**bits - 1) / 2
    assert torch.allclose(places, places.round(), atol=1e-3)
    assert -1e-3 <= float(places.min()) <= float(places.max()) <= 2**bits - 1 + 1e-3
