import pytest
import torch

from cospadi.format.pack import integer_range
from cospadi.format.patterns import keep_largest
from cospadi.solvers.feedback import damped, feedback, refine, sweep, sweep_supports
from cospadi.solvers.quantise import fit_grid, grouped, quantise_rows
from cospadi.solvers.rescale import rescaled
from gram import correlated, loss, rand

FORMATS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def classical(row, hessian, order, snap):
    """Optimal brain quantisation of one row, straight from the inverse Hessian (GPTQ's published form)."""
    hessian = hessian[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, out = row[order].clone(), torch.empty_like(row)
    for j in range(len(row)):
        out[order[j]] = value = snap(left[j], int(order[j]))
        left[j:] -= (left[j] - value) / factor[j, j] * factor[j, j:]
    return out


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize("group", [0, 5, 64])
def test_values_lie_on_a_grid_of_few_levels(bits, symmetric, group):
    matrix = rand(7, 23, seed=1)
    made = quantise_rows(matrix, bits=bits, group=group, symmetric=symmetric)
    assert made.scales.shape == (7, -(-23 // (group or 23)))
    assert torch.equal(made.scales, made.scales.bfloat16().float())
    assert (made.zeros is None) == symmetric
    scales = made.scales.repeat_interleave(group or 23, 1)[:, :23]
    steps = made.matrix / scales
    assert torch.equal(steps, steps.round())
    low, high = integer_range(bits, symmetric)
    if made.zeros is not None:
        steps = steps + made.zeros.repeat_interleave(group or 23, 1)[:, :23]
    assert low <= steps.min() and steps.max() <= high
    # bfloat16 scales and whole zero points cost at most half a step more than the half step of rounding
    assert float(((matrix - made.matrix).abs() / scales).max()) <= 1.01


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_nearest_is_nearest(bits, symmetric):
    matrix = rand(3, 10, seed=2)
    made = quantise_rows(matrix, bits=bits, group=4, symmetric=symmetric)
    low, high = integer_range(bits, symmetric)
    for r in range(3):
        for c in range(10):
            zero = 0 if made.zeros is None else made.zeros[r, c // 4]
            choices = (torch.arange(low, high + 1) - zero) * made.scales[r, c // 4]
            assert (matrix[r, c] - made.matrix[r, c]).abs() == (matrix[r, c] - choices).abs().min()


def test_search_never_raises_the_weighted_error_and_clips_outliers():
    matrix = rand(20, 32, seed=3)
    matrix[:, 5] *= 8
    weight = torch.ones(32)
    weight[5] = 0.01
    errors = [
        (
            (
                fit_grid(matrix, bits=3, importance=weight, search=search).snap(grouped(matrix, 0))[:, 0] - matrix
            ).square()
            * weight
        ).sum(1)
        for search in (0, 20)
    ]
    assert bool((errors[1] <= errors[0]).all())
    assert float(errors[1].sum()) < 0.5 * float(errors[0].sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_stay_zero(symmetric):
    matrix = torch.zeros(3, 9)
    matrix[1] = rand(9, seed=4)
    made = quantise_rows(matrix, bits=4, group=4, symmetric=symmetric, hessian=correlated(9), search=5, sweeps=1)
    assert not made.matrix[0].any() and not made.matrix[2].any() and made.matrix[1].any()


def test_unknown_bits_are_refused():
    with pytest.raises(ValueError, match="7 bits"):
        quantise_rows(rand(2, 4), bits=7)


@pytest.mark.parametrize("block", [1, 4, 128])
def test_feedback_is_the_published_recursion(block):
    rows, hessian = rand(6, 19, seed=5).double(), correlated(19, seed=6)
    grid = fit_grid(rows, bits=3, group=8)
    scales = grid.scales.double().repeat_interleave(8, 1)

    def nearest(values, scale):
        return (values / scale).round().clamp(grid.low, grid.high) * scale

    plan = feedback(hessian, 0.01, dtype=torch.float64)
    made = sweep(rows, plan, lambda target, step: nearest(target, scales[:, plan.order[step]]), block)
    for r in range(6):
        expected = classical(rows[r], damped(hessian, 0.01), plan.order, lambda w, c, r=r: nearest(w, scales[r, c]))
        torch.testing.assert_close(made[r], expected)


def test_feedback_costs_add_up_to_the_loss():
    rows, hessian = rand(4, 12, seed=7).double(), correlated(12, seed=8)
    plan, misses = feedback(hessian, 0.01, dtype=torch.float64), []

    def decide(target, step):
        misses.append(plan.cost[step] * (target - target.round()).square())
        return target.round()

    made = sweep(rows, plan, decide)
    assert float(torch.stack(misses).sum()) == pytest.approx(loss(damped(hessian, 0.01), rows, made), rel=1e-9)


def test_sparse_feedback_is_the_published_recursion_on_each_support():
    rows, hessian = rand(5, 16, seed=9).double(), correlated(16, seed=10)
    support = keep_largest(rows.T, 7).T
    rows = rows * support
    made = sweep_supports(rows, support, hessian, lambda target, row, column: target.round(), memory=2 * 8 * 49)
    assert not made[~support].any()
    order = hessian.diagonal().argsort(descending=True)
    for r in range(5):
        inside = order[support[r, order]]
        sub = damped(hessian, 0.01)[inside][:, inside]
        expected = classical(rows[r, inside], sub, torch.arange(7), lambda w, c: w.round())
        torch.testing.assert_close(made[r, inside], expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, True)])
def test_feedback_beats_nearest_and_descent_beats_feedback(sparse, bits, symmetric):
    rows, hessian = rand(24, 40, seed=11), correlated(40, seed=12)
    support = keep_largest(rows.T, 16).T.contiguous() if sparse else None
    rows = rows * support if sparse else rows
    made = {
        key: quantise_rows(rows, bits=bits, group=16, symmetric=symmetric, support=support, search=10, **more)
        for key, more in {
            "nearest": {},
            "feedback": {"hessian": hessian},
            "descent": {"hessian": hessian, "sweeps": 2},
        }.items()
    }
    errors = {key: loss(hessian, rows, one.matrix) for key, one in made.items()}
    assert errors["feedback"] < 0.9 * errors["nearest"]
    assert errors["descent"] < errors["feedback"]
    if support is not None:
        assert all(not one.matrix[~support].any() for one in made.values())
    assert torch.equal(made["feedback"].scales, made["descent"].scales)


def test_descent_ends_at_least_squares_on_the_support():
    rows, hessian = rand(3, 10, seed=13).double(), correlated(10, seed=14)
    support = keep_largest(rows.T, 4).T
    made = refine(
        rows, rows * support, hessian, lambda target, _: target, sweeps=400, support=support, damping=0.05, block=3
    )
    exact = damped(hessian, 0.05)
    for r in range(3):
        inside = support[r].nonzero()[:, 0]
        best = torch.linalg.solve(exact[inside][:, inside], exact[inside] @ rows[r])
        torch.testing.assert_close(made[r, inside], best, atol=1e-6, rtol=1e-6)
    assert not made[~support].any()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient_hessians(tokens):
    rows = rand(4, 21, seed=15)
    inputs = rand(tokens, 21, seed=16).double()
    made = quantise_rows(rows, bits=4, group=6, hessian=inputs.T @ inputs, search=4, sweeps=1)
    assert bool(made.matrix.isfinite().all())
    nearest = quantise_rows(rows, bits=4, group=6, search=4)
    assert float((made.matrix - rows).norm()) < 3 * float((nearest.matrix - rows).norm())


def test_indefinite_and_broken_hessians_are_refused():
    for hessian in (torch.diag(torch.tensor([1e12, -1e12, 1.0])), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="positive semi-definite"):
            feedback(hessian)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_best_of_several_zero_points_and_ranges_is_taken(bits):
    matrix, weight, search = rand(6, 16, seed=4), rand(16, seed=5).abs() + 0.1, 7
    found = fit_grid(matrix, bits=bits, symmetric=False, importance=weight, search=search, shifts=1)
    plain = fit_grid(matrix, bits=bits, symmetric=False)
    top = 2**bits - 1
    for row in range(6):
        best = torch.inf
        for zero in {min(max(int(plain.zeros[row]) + shift, 0), top) for shift in (-1, 0, 1)}:
            for step in range(search + 1):
                scale = (plain.scales[row] * (1 - 0.7 * step / search)).double()
                near = ((matrix[row].double() / scale).round() + zero).clamp(0, top) - zero
                best = min(best, float(((near * scale - matrix[row]).square() * weight).sum()))
        snapped = found.snap(grouped(matrix, 0))[row, 0]
        assert float(((snapped - matrix[row]).square() * weight).sum()) == pytest.approx(best, rel=0.02)
        assert 0 <= float(found.zeros[row]) <= top


def test_zero_points_are_left_alone_where_there_are_none():
    matrix = rand(5, 32, seed=6)
    moved, plain = (fit_grid(matrix, bits=3, group=8, search=5, shifts=shifts) for shifts in (2, 0))
    assert torch.equal(moved.scales, plain.scales) and torch.equal(moved.zeros, plain.zeros)


def test_at_two_bits_the_choice_of_the_zero_point_pays():
    matrix = rand(300, 64, seed=7)
    plain, moved = (
        quantise_rows(matrix, bits=2, group=64, symmetric=False, search=30, shifts=shifts).matrix for shifts in (0, 1)
    )
    assert (moved - matrix).square().sum() < 0.99 * (plain - matrix).square().sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_step_zero_points_come_nearer_and_stay_on_their_grid(bits):
    matrix = rand(40, 96, seed=30 + bits)
    whole = fit_grid(matrix, bits=bits, group=32, symmetric=False, search=20, shifts=1)
    half = fit_grid(matrix, bits=bits, group=32, symmetric=False, search=20, shifts=2, half=True)
    assert torch.equal(2 * half.zeros, (2 * half.zeros).round()) and bool((half.zeros % 1 != 0).any())
    assert half.zeros.min() >= 0 and half.zeros.max() <= 2**bits - 1
    split = grouped(matrix, 32)
    levels = (torch.arange(2**bits) - half.zeros[..., None]) * half.scales[..., None]  # (rows, groups, levels)
    nearest = (split[..., None] - levels[:, :, None]).abs().amin(-1)
    assert torch.allclose((half.snap(split) - split).abs(), nearest, atol=1e-6)
    errors = [float((grid.snap(split) - split).square().sum()) for grid in (whole, half)]
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_feedback_and_fitted_scales_keep_half_step_zero_points(bits):
    matrix, hessian = rand(12, 40, seed=40), correlated(40, seed=41)
    made = quantise_rows(
        matrix, bits=bits, group=16, symmetric=False, hessian=hessian, search=10, shifts=2, sweeps=2, half=True
    )
    fitted = rescaled(matrix, made, bits=bits, group=16, hessian=hessian, rounds=2)
    for found in (made, fitted):
        assert found.zeros is not None and torch.equal(found.zeros, made.zeros)
        scales, zeros = (item.repeat_interleave(16, 1)[:, :40] for item in (found.scales, found.zeros))
        levels = found.matrix / scales + zeros
        assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.min() >= -1e-4
        assert levels.max() <= 2**bits - 1 + 1e-4
    assert loss(hessian, matrix, fitted.matrix) <= loss(hessian, matrix, made.matrix) * 1.0001


def test_weighting_by_the_diagonal_protects_the_inputs_of_large_energy():
    matrix, hessian = rand(60, 64, seed=50), correlated(64, seed=51)
    loud = torch.zeros(64, dtype=torch.bool)
    loud[::8] = True
    hessian += 50 * hessian.diagonal().mean() * loud.diag()
    errors = [
        quantise_rows(
            matrix, bits=3, group=64, symmetric=False, hessian=hessian, search=30, weighting=weighting
        ).matrix.sub(matrix)[:, loud].square().sum()
        for weighting in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 5])
def test_symmetric_grids_in_half_steps_have_no_zero_and_use_every_level(bits, group):
    matrix = rand(40, 123, seed=30)
    made = quantise_rows(matrix, bits=bits, group=group, half=True, search=20)
    assert made.zeros is None and torch.equal(made.scales, made.scales.bfloat16().float())
    scales = made.scales.repeat_interleave(group or 123, 1)[:, :123]
    levels = 2 * made.matrix / scales
    odd = range(1 - 2**bits, 2**bits, 2)
    assert torch.equal(levels, levels.round()) and set(levels.unique().tolist()) <= set(odd)
    if bits < 5:
        assert set(levels.unique().tolist()) == set(odd)
    choices = torch.tensor(odd)[:, None, None] / 2 * scales
    assert torch.equal((made.matrix - matrix).abs(), (choices - matrix).abs().amin(0))


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.122), (3, 0.040), (4, 0.0130)])
def test_half_steps_on_gaussian_values_are_near_the_best_uniform_grid(bits, limit):
    """The best uniform levels leave .1188, .0374 and .0115 (Max, 1960)."""
    matrix = rand(50, 1000, seed=31)
    halves, wholes = (quantise_rows(matrix, bits=bits, half=half, search=40).matrix for half in (True, False))
    missed = float((matrix - halves).square().mean())
    assert missed < limit and missed < 0.95 * float((matrix - wholes).square().mean())


def test_half_steps_pack_and_unpack():
    from cospadi.format import MatrixSpec, pack, unpack

    matrix, hessian = rand(9, 33, seed=32), correlated(33)
    for bits in (2, 3, 4, 8):
        made = quantise_rows(matrix, bits=bits, half=True, hessian=hessian, search=10, sweeps=1)
        spec = MatrixSpec(9, 33, bits=bits, half=True)
        assert torch.equal(unpack(pack(made, spec), spec), made.matrix)
