from typing import get_args

import numpy as np
import pytest
import torch

from cospadi.errors import NumericalError
from cospadi.pruning.depth.replaceme.normal_equations import Sums
from cospadi.pruning.depth.replaceme.transform import Structure, correction, cosine, least_squares


def problem(tokens=200, width=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=dtype)
    inputs = torch.randn(tokens, width, generator=generator, dtype=dtype) @ mixing
    targets = inputs @ torch.randn(width, width, generator=generator, dtype=dtype)
    return inputs, targets + torch.randn(tokens, width, generator=generator, dtype=dtype)


def equations(inputs, targets, parts=3):
    sums = Sums(inputs.shape[1])
    for m, r in zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
        sums.add(m, r)
    return sums.finish("test")


def error(inputs, targets, transform):
    return float((inputs.double() @ transform.double() - targets.double()).square().sum() / len(inputs))


@pytest.mark.parametrize("seed", range(4))
def test_the_full_transform_is_that_of_numpy(seed):
    inputs, targets = problem(seed=seed)
    expected = np.linalg.lstsq(inputs.numpy(), targets.numpy(), rcond=None)[0]
    found = least_squares(equations(inputs, targets))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-8)


def test_sums_do_not_grow_and_do_not_depend_on_the_cutting():
    inputs, targets = problem(tokens=3000)
    one, many = equations(inputs, targets, 1), equations(inputs, targets, 700)
    torch.testing.assert_close(one.gram, many.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.cross, many.cross, rtol=1e-12, atol=1e-12)
    sums = Sums(12)
    held = sum(value.nbytes for value in vars(sums).values() if isinstance(value, torch.Tensor))
    sums.add(inputs, targets)
    assert sum(value.nbytes for value in vars(sums).values() if isinstance(value, torch.Tensor)) == held
    assert one.tokens == many.tokens == 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_short_floats_are_exact_to_float32(dtype):
    inputs, targets = problem(tokens=2000, dtype=torch.float32)
    inputs, targets = inputs.to(dtype), targets.to(dtype)
    found = equations(inputs, targets)
    expected = inputs.double().T @ inputs.double() / 2000
    torch.testing.assert_close(found.gram, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("structure", get_args(Structure))
def test_every_structure_works_and_its_loss_is_the_real_one(structure):
    inputs, targets = problem()
    sums = equations(inputs, targets)
    transform = least_squares(sums, structure=structure, rank=3)
    assert transform.shape == (12, 12)
    assert sums.loss(transform) == pytest.approx(error(inputs, targets, transform), rel=1e-9)
    assert sums.loss(transform) < sums.loss(torch.eye(12))
    full = sums.loss(least_squares(sums))
    assert sums.loss(transform) >= full * (1 - 1e-12)


def test_a_ridge_pulls_towards_plain_removal():
    inputs, targets = problem()
    sums = equations(inputs, targets)
    alpha = 0.3 * sums.gram.diagonal().mean()
    expected = torch.linalg.solve(
        sums.gram + alpha * torch.eye(12, dtype=torch.float64),
        sums.cross + alpha * torch.eye(12, dtype=torch.float64),
    )
    torch.testing.assert_close(least_squares(sums, ridge=0.3), expected, rtol=1e-9, atol=1e-9)
    far = least_squares(sums, ridge=1e9)
    torch.testing.assert_close(far, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_fewer_tokens_than_dimensions_leave_what_is_unknown_alone(ridge):
    inputs, targets = problem(tokens=5)
    transform = least_squares(equations(inputs, targets), ridge=ridge)
    assert bool(transform.isfinite().all())
    if ridge == 0:
        assert error(inputs, targets, transform) < 1e-12
    _, _, right = torch.linalg.svd(inputs, full_matrices=True)
    unseen = right[5:]  # directions that no token has
    torch.testing.assert_close(unseen @ transform, unseen, rtol=0, atol=1e-6)


def test_sums_of_two_texts_add_up():
    inputs, targets = problem()
    both = equations(inputs[:70], targets[:70]) + equations(inputs[70:], targets[70:])
    whole = equations(inputs, targets)
    assert both.tokens == whole.tokens and both.energy == pytest.approx(whole.energy)
    torch.testing.assert_close(both.gram, whole.gram)
    torch.testing.assert_close(both.cross, whole.cross)


@pytest.mark.parametrize("seed", range(4))
def test_a_correction_of_a_whole_layer_is_that_of_numpy(seed):
    inputs, targets = problem(seed=seed)
    targets = targets[:, :5]  # a layer need not be square
    sums = Sums(12, targets=5)
    sums.add(inputs, targets)
    expected, left, *_ = np.linalg.lstsq(inputs.numpy(), targets.numpy(), rcond=None)
    found = correction(sums.finish("test"))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-8)
    assert sums.finish("test").loss(found) == pytest.approx(float(left.sum()) / len(inputs), rel=1e-9)


def test_a_ridge_pulls_a_correction_towards_nothing():
    inputs, targets = problem()
    sums = equations(inputs, targets)
    shift = 0.3 * sums.gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(sums.gram + shift, sums.cross)
    torch.testing.assert_close(correction(sums, ridge=0.3), expected, rtol=1e-9, atol=1e-9)
    norms = [float(correction(sums, ridge=ridge).norm()) for ridge in (0.0, 1e-2, 1.0, 1e9)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 1e-6
    # fewer tokens than inputs: the least of the steps that fit, whether or not a ridge keeps the system regular
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = equations(inputs, targets[:5], 1)
    for ridge in (0.0, 1e-9):
        torch.testing.assert_close(
            correction(few, ridge=ridge), torch.linalg.pinv(inputs) @ targets[:5], rtol=1e-5, atol=1e-5
        )


def test_a_diagonal_is_solved_entry_by_entry():
    inputs, targets = problem()
    found = least_squares(equations(inputs, targets), structure="diagonal")
    expected = (inputs * targets).sum(0) / inputs.square().sum(0)
    torch.testing.assert_close(found, torch.diag(expected), rtol=1e-9, atol=1e-9)


def test_an_orthonormal_transform_is_the_nearest_rotation():
    inputs, targets = problem()
    found = least_squares(equations(inputs, targets), structure="orthonormal")
    torch.testing.assert_close(found.T @ found, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)
    best = error(inputs, targets, found)
    for _ in range(20):
        turn = torch.linalg.qr(found + 0.1 * torch.randn(12, 12, dtype=torch.float64))[0]
        turn = turn * torch.sign((turn * found).sum(0))
        assert error(inputs, targets, turn) >= best


def test_a_ridge_turns_a_rotation_back_towards_the_identity():
    inputs, targets = problem()
    sums = equations(inputs, targets)
    alpha = 0.3 * sums.gram.diagonal().mean()
    identity = torch.eye(12, dtype=torch.float64)
    found = least_squares(sums, structure="orthonormal", ridge=0.3)

    def price(turn):
        return sums.loss(turn) + float(alpha * (turn - identity).square().sum())

    for _ in range(20):
        nudge = 0.05 * torch.randn(12, 12, dtype=torch.float64)
        assert price(found @ torch.linalg.matrix_exp(nudge - nudge.T)) > price(found)
    far, near = (least_squares(sums, structure="orthonormal", ridge=ridge) for ridge in (0.0, 1e9))
    torch.testing.assert_close(near, identity, rtol=0, atol=1e-6)
    assert (far - identity).norm() > (found - identity).norm() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rotation_leaves_alone_what_little_text_says_nothing_about(dtype):
    inputs, targets = problem(tokens=5, dtype=dtype)
    same = least_squares(equations(inputs, inputs), structure="orthonormal")
    torch.testing.assert_close(same, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-5)
    sums = equations(inputs, targets)
    found = least_squares(sums, structure="orthonormal")
    torch.testing.assert_close(found.T @ found, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)
    pulled = least_squares(sums, structure="orthonormal", ridge=1e-5)  # as a ridge does that is next to none
    torch.testing.assert_close(found, pulled, rtol=0, atol=1e-2)
    assert sums.loss(found) <= sums.loss(pulled) + 1e-6


@pytest.mark.parametrize("rank", [1, 4, 12, 99])
def test_low_rank_is_the_best_step_of_its_rank(rank):
    inputs, targets = problem()
    sums = equations(inputs, targets)
    found = least_squares(sums, structure="low_rank", rank=rank)
    step = found - torch.eye(12, dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(step, atol=1e-8)) <= rank
    # Reduced-rank regression: the fitted values of the full step, truncated, are what the best step gives.
    fitted = inputs @ (least_squares(sums) - torch.eye(12, dtype=torch.float64))
    left, singular, right = torch.linalg.svd(fitted, full_matrices=False)
    best = left[:, :rank] * singular[:rank] @ right[:rank]
    torch.testing.assert_close(inputs @ step, best, rtol=0, atol=1e-6)


def test_cosine_starts_at_the_identity_and_turns_the_branch_to_its_target():
    inputs, targets = problem(tokens=3000, dtype=torch.float32)

    def turn(transform):
        return float(torch.cosine_similarity(inputs @ transform.float(), targets, dim=-1).mean())

    near = cosine(inputs, targets, epochs=1, learning_rate=1e-9)
    torch.testing.assert_close(near, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
    short = cosine(inputs, targets, epochs=2, learning_rate=1e-2)
    long = cosine(inputs, targets, epochs=40, learning_rate=1e-2)
    assert turn(torch.eye(12)) < turn(short) < turn(long)
    assert torch.equal(short, cosine(inputs, targets, epochs=2, learning_rate=1e-2))
    assert not torch.equal(short, cosine(inputs, targets, epochs=2, learning_rate=1e-2, seed=1))
    straight = cosine(inputs, targets, epochs=2, learning_rate=1e-2, diagonal=True)
    assert torch.equal(straight, torch.diag(straight.diagonal()))
    assert turn(straight) > turn(torch.eye(12))


def test_damaged_or_empty_activations_are_refused():
    inputs, targets = problem()
    inputs[3, 3] = float("inf")
    with pytest.raises(NumericalError, match="block 7"):
        sums = Sums(12)
        sums.add(inputs, targets)
        sums.finish("block 7")
    with pytest.raises(NumericalError, match="zero on this text"):
        least_squares(equations(torch.zeros(9, 12), torch.ones(9, 12)))
