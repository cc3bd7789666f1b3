import pytest
import torch

from cospadi.format.hadamard import hadamard
from cospadi.solvers.quantise import quantise_rows
from cospadi.solvers.rescale import rescaled
from cospadi.solvers.rotate import input_scales, random_signs, rotated_gram, rotated_rows, unrotated_rows
from cospadi.solvers.trellis_rows import Problem, TrellisCode, trellis_many
from gram import correlated, loss, rand


def rotation(rows, seed=0, scaled=True):
    return random_signs(rows.shape[1], seed), input_scales(rows) if scaled else None


def transform(x, signs, scales, block):
    factors = signs.double() if scales is None else signs.double() * scales.double()
    return hadamard(x.double() * factors, block)


def spiky(count, columns, seed):
    """Weights some inputs of which have large ones, and the Gram of inputs some of which are large."""
    rows, gram = rand(count, columns, seed=seed), correlated(columns, seed=seed + 1, tokens=4 * columns)
    rows[:, ::9] *= 6
    energy = torch.ones(columns, dtype=torch.float64)
    energy[4::11] = 8
    return rows, gram * energy[:, None] * energy


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("columns", "block"), [(64, 128), (84, 64), (33, 8), (1, 128)])
def test_outputs_and_losses_are_the_same_in_the_rotated_basis(columns, block, scaled):
    rows, x = rand(7, columns, seed=1).double(), rand(50, columns, seed=2).double()
    signs, scales = rotation(rows, 3, scaled)
    turned = rotated_rows(rows, signs, scales, block)
    z = transform(x, signs, scales, block)
    torch.testing.assert_close(z @ turned.double().T, x @ rows.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unrotated_rows(turned, signs, scales, block), rows.float(), rtol=1e-5, atol=1e-5)
    gram = rotated_gram(x.T @ x, signs, scales, block)
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, z.T @ z)
    changed = turned + 0.1 * rand(7, columns, seed=4)
    back = unrotated_rows(changed, signs, scales, block)
    assert loss(gram, turned, changed) == pytest.approx(loss(x.T @ x, rows, back), rel=1e-4)


def test_signs_are_fixed_by_the_seed_and_about_even():
    signs = random_signs(1000, 5)
    assert torch.equal(signs, random_signs(1000, 5)) and not torch.equal(signs, random_signs(1000, 6))
    assert torch.equal(signs.abs(), torch.ones(1000)) and abs(float(signs.mean())) < 0.1
    assert random_signs(8, 0).tolist() == random_signs(8, 0).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_even_out_the_weights_of_the_inputs(dtype):
    rows, _ = spiky(40, 54, 7)
    scales = input_scales(rows, dtype)
    assert torch.equal(scales, scales.to(dtype).float())
    assert float(scales.mean()) == pytest.approx(1, rel=1e-2)
    sizes = (rows / scales).square().mean(0).sqrt()
    torch.testing.assert_close(sizes / sizes.mean(), torch.ones(54), rtol=1e-2, atol=0)


def test_scales_of_inputs_without_weights():
    rows = rand(5, 8, seed=8)
    rows[:, 2] = 0
    scales = input_scales(rows)
    assert 0 < scales[2] < 0.02
    assert input_scales(0 * rows).tolist() == [1] * 8
    signs = random_signs(8, 0)
    assert bool(torch.isfinite(rotated_rows(rows, signs, scales, 8)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rotated_integers_without_groups_beat_groups_in_half_steps(bits):
    """At fewer bytes: no group scales, no zero points."""
    rows, gram = spiky(64, 192, 9)
    signs, scales = rotation(rows)
    turned, around = rotated_rows(rows, signs, scales, 128), rotated_gram(gram, signs, scales, 128)
    options = {"bits": bits, "half": True, "search": 30, "sweeps": 2, "weighting": 0.0}
    found = quantise_rows(turned, group=0, hessian=around, **options)
    fitted = rescaled(turned, found, bits=bits, group=0, hessian=around, rounds=3, half=True)
    assert fitted.zeros is None and fitted.scales.shape == (64, 1)
    groups = quantise_rows(rows, group=64, hessian=gram, **options | {"weighting": 0.5})
    plain = quantise_rows(rows, group=0, hessian=gram, **options | {"weighting": 0.5})
    back = unrotated_rows(fitted.matrix, signs, scales, 128)
    assert loss(gram, rows, back) == pytest.approx(loss(around, turned, fitted.matrix), rel=1e-3)
    assert loss(gram, rows, back) <= loss(around, turned, found.matrix)
    assert loss(gram, rows, back) < 0.9 * loss(gram, rows, groups.matrix) < 0.9 * loss(gram, rows, plain.matrix)


def test_rotated_trellis_codes_beat_rotated_integers():
    rows, gram = spiky(64, 96, 10)
    signs, scales = rotation(rows)
    turned, around = rotated_rows(rows, signs, scales, 128), rotated_gram(gram, signs, scales, 128)
    integers = quantise_rows(turned, bits=2, half=True, hessian=around, search=30, sweeps=2, weighting=0.0)
    codes = trellis_many([Problem(turned, around)], TrellisCode(2, 10, 4, 64), sweeps=2)[0]
    assert loss(around, turned, codes.matrix) < 0.85 * loss(around, turned, integers.matrix)
