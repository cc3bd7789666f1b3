"""The kernel that decides blocks of inputs, on CPU, in Triton's interpreter.

Run by test_interpreted.py in a process of its own, with TRITON_INTERPRET=1 from the start.
"""

import os

import pytest
import torch

from cospadi.solvers import feedback as module
from cospadi.solvers.feedback import feedback, refine, sweep
from cospadi.solvers.grid import GridSteps
from cospadi.solvers.quantise import fit_grid, quantise_rows
from cospadi.solvers.rescale import rescaled
from cospadi.solvers.triton_feedback import BlockKernels
from gram import correlated, loss, rand

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"

FORMATS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
SHAPES = [(1, 1, 0), (5, 3, 0), (13, 20, 8), (8, 30, 0), (3, 98, 96), (11, 33, 32), (17, 9, 0), (2, 40, 32)]
"""Rows, inputs of the block, group."""


def grids(rows, bits, symmetric, group):
    """Grids of rows (count, n), some of whose scales are zero."""
    rows = rows.clone()
    rows[::5, : group or None] = 0
    grid = fit_grid(rows, bits=bits, group=group, symmetric=symmetric)
    return grid, grid.steps(rows.shape[1], group or rows.shape[1])


def check(values, targets, steps, inputs):
    """Values are the nearest of the grid to float64 targets, except where these lie at a tie up to rounding."""
    scales, zeros = (item.double()[steps.groups[inputs].long()] for item in (steps.scales, steps.zeros))
    safe = torch.where(scales > 0, scales, 1.0)
    place = targets / safe
    expected = (place.round() + zeros).clamp(steps.low, steps.high)
    level = torch.where(scales > 0, values.double() / safe + zeros, expected)
    assert torch.equal(values.double(), (level - zeros) * scales)
    assert not values[scales == 0].any()
    tie = ((place - place.floor() - 0.5).abs() < 1e-4) & ((level - expected).abs() == 1)
    assert bool(((level == expected) | tie).all())


@pytest.mark.parametrize("turn", range(len(SHAPES)))
def test_a_block_of_the_sweep(turn):
    (count, width, group), (bits, symmetric) = SHAPES[turn], FORMATS[turn]
    weights = rand(width, count, seed=turn)
    _, steps = grids(weights.T, bits, symmetric, group)
    coupling = 0.3 * rand(width, width, seed=turn + 1).tril(-1)
    inputs = torch.randperm(width, generator=torch.Generator().manual_seed(turn))
    targets = weights + 0.1 * rand(width, count, seed=turn + 2)
    values, errors = BlockKernels(steps).sweep_block(targets, weights, coupling, inputs)
    assert torch.equal(errors, weights - values)
    check(values, targets.double() + coupling.double() @ errors.double(), steps, inputs)


@pytest.mark.parametrize("turn", range(len(SHAPES)))
def test_a_block_of_the_descent(turn):
    (count, width, group), (bits, symmetric) = SHAPES[turn], FORMATS[::-1][turn]
    rows, before = rand(count, width, seed=turn), rand(width, count, seed=turn + 3)
    _, steps = grids(rows, bits, symmetric, group)
    near = correlated(width, seed=turn).float() + 0.1 * torch.eye(width)
    errors, slope = rows.T - before, rand(width, count, seed=turn + 4)
    values, after = BlockKernels(steps).refine_block(before, errors, slope, near, slice(0, width))
    torch.testing.assert_close(after, rows.T - values)
    changes = (values - before).double()
    moved = slope.double() - near.double().tril(-1) @ changes
    check(values, before.double() + moved / near.double().diagonal()[:, None], steps, torch.arange(width))


def test_ties_go_to_the_even_level_and_far_targets_to_the_last():
    one = torch.ones(1, 8)
    steps = GridSteps(one, 0 * one, torch.zeros(1, dtype=torch.int32), -7, 7)
    targets = torch.tensor([[0.5, 1.5, -0.5, -2.5, 1e30, -torch.inf, torch.inf, torch.nan]])
    values, _ = BlockKernels(steps).sweep_block(targets, one, torch.zeros(1, 1), slice(None))
    assert values[0, :7].tolist() == [0, 2, 0, -2, 7, -7, 7]
    assert bool(values[0, 7].isnan())


@pytest.fixture
def forced(monkeypatch):
    """A function after whose call blocks are decided by the kernel on the CPU too."""
    used = []

    def kernels(rows, grid):
        used.append(isinstance(grid, GridSteps))
        return BlockKernels(grid) if used[-1] else None

    yield lambda: monkeypatch.setattr(module, "block_kernels", kernels)
    assert any(used)


@pytest.mark.parametrize(
    ("count", "columns", "group", "symmetric"), [(8, 41, 32, True), (5, 50, 0, False), (9, 1, 0, True)], ids=str
)
def test_several_blocks_are_as_input_by_input(count, columns, group, symmetric, forced):
    rows, hessian = rand(count, columns, seed=columns), correlated(columns, seed=2, tokens=400)
    grid, steps = grids(rows, 3, symmetric, group)
    plan = feedback(hessian)
    start = grid.at(slice(None), steps.groups.long()).snap(rows)

    def both():
        return sweep(rows, plan, steps, block=16), refine(rows, start, hessian, steps, sweeps=1, block=9)

    expected = both()
    forced()
    for made, right in zip(both(), expected, strict=True):
        # a decision at a tie may fall the other way, and those of its row that follow it
        assert float((made == right).float().mean()) > 0.98
        assert loss(hessian, rows, made) == pytest.approx(loss(hessian, rows, right), rel=5e-3)


def test_quantising_and_rescaling(forced):
    rows, hessian = rand(7, 70, seed=5), correlated(70, seed=6)

    def both():
        start = quantise_rows(rows, bits=2, group=32, symmetric=False, hessian=hessian, search=5, sweeps=1)
        return start, rescaled(rows, start, bits=2, group=32, hessian=hessian, rounds=1)

    expected = both()
    forced()
    for made, right in zip(both(), expected, strict=True):
        assert loss(hessian, rows, made.matrix) == pytest.approx(loss(hessian, rows, right.matrix), rel=1e-2)


def test_rows_with_a_support_do_without(forced):
    rows, hessian = rand(6, 24, seed=7), correlated(24, seed=8)
    support = torch.ones(6, 24, dtype=torch.bool)
    support[:, ::3] = False
    forced()
    quantise_rows(rows, bits=4, group=8, hessian=hessian)
    made = quantise_rows(rows * support, bits=4, group=8, hessian=hessian, support=support, sweeps=1)
    assert not made.matrix[~support].any()
