"""Blocks of inputs decided by a kernel, on a GPU; interpreted_feedback.py runs it in Triton's interpreter."""

import pytest
import torch

from cospadi.solvers.feedback import block_kernels, feedback, refine, sweep
from cospadi.solvers.grid import GridSteps
from cospadi.solvers.quantise import fit_grid, quantise_rows
from cospadi.solvers.rescale import rescaled
from gram import correlated, loss, rand


def test_there_is_no_kernel_on_a_cpu():
    rows = rand(3, 8)
    assert block_kernels(rows, fit_grid(rows, bits=4).steps(8, 8)) is None


def test_steps_describe_the_grid_of_every_column():
    rows = rand(3, 50, seed=1)
    grid = fit_grid(rows, bits=3, group=16, symmetric=False)
    steps = grid.steps(50, 16)
    for column in (0, 15, 16, 49):
        one = grid.at(slice(None), column // 16)
        assert torch.equal(steps.scales[steps.groups[column]], one.scales)
        assert torch.equal(steps.zeros[steps.groups[column]], one.zeros)
    assert (steps.low, steps.high) == (0, 7) and steps.scales.is_contiguous() and steps.zeros.is_contiguous()


FORMATS = [(2, 32, False), (3, 0, True), (4, 96, False), (8, 32, True)]
SHAPES = [(300, 515), (77, 1000), (9, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize(("count", "columns"), SHAPES)
def test_on_a_gpu_losses_are_those_on_a_cpu(bits, group, symmetric, count, columns):
    rows, hessian = rand(count, columns, seed=bits), correlated(columns, seed=3, tokens=2 * columns)
    rows[::7] = 0
    losses = []
    for device in ("cpu", "cuda"):
        mine, curvature = rows.to(device), hessian.to(device)
        start = quantise_rows(mine, bits=bits, group=group, symmetric=symmetric, hessian=curvature, search=10, sweeps=1)
        found = rescaled(mine, start, bits=bits, group=group, hessian=curvature, rounds=2)
        losses.append([loss(curvature, mine, item.matrix) for item in (start, found)])
        assert not found.matrix[::7].any()
    assert losses[1] == pytest.approx(losses[0], rel=0.01, abs=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("count", "columns"), SHAPES)
def test_on_a_gpu_the_kernel_is_as_input_by_input(symmetric, count, columns, monkeypatch):
    rows, hessian = rand(count, columns, seed=11).cuda(), correlated(columns, seed=12, tokens=2 * columns).cuda()
    grid = fit_grid(rows, bits=3, group=32, symmetric=symmetric)
    steps, plan = grid.steps(columns, 32), feedback(hessian)
    assert block_kernels(rows, steps) is not None
    assert block_kernels(rows.double(), steps) is None

    monkeypatch.setattr(GridSteps, "decide", lambda *_: lambda *_: pytest.fail("decided one by one"))

    def nearest(target, column):
        return grid.at(slice(None), column // 32).snap(target)

    start = nearest(rows, torch.arange(columns, device="cuda"))
    inputs = plan.order.tolist()
    pairs = [
        (sweep(rows, plan, steps), sweep(rows, plan, lambda target, step: nearest(target, inputs[step]))),
        (refine(rows, start, hessian, steps, sweeps=1), refine(rows, start, hessian, nearest, sweeps=1)),
    ]
    for made, right in pairs:
        # a decision at a tie may fall the other way, and those of its row that follow it
        assert float((made == right).float().mean()) > 0.9
        assert loss(hessian, rows, made) == pytest.approx(loss(hessian, rows, right), rel=5e-3, abs=1e-12)
