"""CoSpaDi: its error is the layer's output error, and it beats truncated SVD at the same bytes."""

import pytest
import torch
from dictionary_cases import calibration, decaying, gram, rebuilt, solve

from cospadi.errors import RecipeError
from cospadi.format import pack, unpack
from cospadi.methods.base import GroupShape, get_method
from cospadi.solvers.whitening import cholesky_whitening

OPTIONS = {"rounds": 6}


def test_whitened_error_is_the_output_error():
    x, w = calibration(300, 24, seed=0), decaying(24, 37, seed=1)
    _, factors = solve("cospadi", [w], [gram(x)], 0.6, OPTIONS)
    output = (x @ (w - rebuilt(factors))).square().sum() / len(x)
    whitened = cholesky_whitening(gram(x)).apply(w)
    claimed = factors.info["losses"][-1] * whitened.square().sum()
    assert float(claimed) == pytest.approx(float(output), rel=1e-6)


@pytest.mark.parametrize(("d", "n"), [(64, 64), (48, 110)])
def test_below_whitened_svd_of_the_same_bytes(d, n):
    x, w = calibration(400, d, seed=2, slope=0.5), decaying(d, n, seed=3)
    spec, factors = solve("cospadi", [w], [gram(x)], 0.75, {"rounds": 20})
    whitening = cholesky_whitening(gram(x))
    values = torch.linalg.svdvals(whitening.apply(w))
    rank = int(spec.bytes / (2 * (d + n))) + 1  # rounded in favour of SVD
    error = whitening.apply(w - rebuilt(factors)).square().sum()
    assert float(error) < float(values[rank:].square().sum())


def test_plan_is_equation_10():
    method = get_method("cospadi")
    # the paper's example, keep .8, as it rounds: k = 3657, s = 1828
    shape = GroupShape(("a",), 4096, (12288,))
    spec = method.spec(shape, int(0.8 * shape.dense_bytes), {})
    assert abs(spec.atoms - 3657) <= 32 and abs(spec.codes.nonzeros - 1828) <= 16
    assert 0.999 * 0.8 * shape.dense_bytes < spec.bytes <= 0.8 * shape.dense_bytes
    eleven = method.spec(shape, int(0.8 * shape.dense_bytes), {"value_bits": 14})
    assert abs(eleven.atoms - 3932) <= 32 and abs(eleven.codes.nonzeros - 1966) <= 16
    with pytest.raises(RecipeError, match="value_bits"):
        method.spec(shape, 10**9, {"value_bits": 8})


@pytest.mark.parametrize("bits", [14, 16])
def test_factors_pack(bits):
    x, w = calibration(200, 20, seed=4), decaying(20, 33, seed=5)
    spec, factors = solve("cospadi", [w], [gram(x)], 0.7, {**OPTIONS, "value_bits": bits})
    codes = unpack(pack(factors.codes, spec.codes), spec.codes, torch.float64)
    torch.testing.assert_close(
        codes, factors.codes.matrix, rtol=2.0**-8 if bits == 16 else 2.0**-6 + 2.0**-8, atol=1e-12
    )
    assert ((codes != 0).sum(1) == spec.codes.nonzeros).all()
    assert pack(factors.dictionary, spec.dictionary)["values"].shape == (spec.atoms, 20)


def test_atoms_have_unit_variance_on_calibration_text():
    x, w = calibration(300, 18, seed=6), decaying(18, 40, seed=7)
    _, factors = solve("cospadi", [w], [gram(x)], 0.6, OPTIONS)
    energy = (x @ factors.dictionary.matrix.T).square().mean(0)
    torch.testing.assert_close(energy, torch.ones_like(energy))


def test_whitening_helps_and_can_be_left_out():
    x, w = calibration(300, 32, seed=8), decaying(32, 48, seed=9)
    error = {}
    for whiten in (True, False):
        _, factors = solve("cospadi", [w], [gram(x)], 0.5, {**OPTIONS, "whiten": whiten})
        error[whiten] = float((x @ (w - rebuilt(factors))).square().sum())
        if not whiten:
            other = solve("cospadi", [w], [torch.eye(32, dtype=torch.float64)], 0.5, OPTIONS)[1]
            torch.testing.assert_close(rebuilt(factors), rebuilt(other))
    assert error[True] < 0.7 * error[False]


def test_siblings_are_solved_side_by_side():
    x, w = calibration(200, 16, seed=10), decaying(16, 40, seed=11)
    spec, together = solve("cospadi", [w[:, :25], w[:, 25:]], [gram(x)], 0.6, OPTIONS)
    _, single = solve("cospadi", [w], [gram(x)], 0.6, OPTIONS)
    assert spec.codes.rows == 40
    torch.testing.assert_close(rebuilt(together), rebuilt(single))


def test_cross_layer_uses_the_mean_gram():
    first, second = calibration(200, 16, seed=12), calibration(200, 16, seed=13)
    weights = [decaying(16, 20, seed=14), decaying(16, 20, seed=15)]
    mean = (gram(first) + gram(second)) / 2
    apart = solve("cospadi", weights, [gram(first), gram(second)], 0.6, OPTIONS)[1]
    shared = solve("cospadi", weights, [mean], 0.6, OPTIONS)[1]
    torch.testing.assert_close(rebuilt(apart), rebuilt(shared))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_gram_and_zero_output(dtype):
    x, w = calibration(9, 24, seed=16), decaying(24, 30, seed=17).to(dtype)
    w[:, 4] = 0
    spec, factors = solve("cospadi", [w], [gram(x)], 0.6, OPTIONS)
    pack(factors.codes, spec.codes)  # a support of zeros is a support
    approximate = rebuilt(factors).double()
    assert (x @ (w.double() - approximate)).square().sum() < 0.1 * (x @ w.double()).square().sum()
    assert (approximate[:, 4] == 0).all()


def test_seed_decides():
    x, w = calibration(100, 12, seed=18), decaying(12, 20, seed=19)
    same = [rebuilt(solve("cospadi", [w], [gram(x)], 0.6, OPTIONS, seed=s)[1]) for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_mod_update():
    x, w = calibration(200, 24, seed=20), decaying(24, 40, seed=21)
    _, factors = solve("cospadi", [w], [gram(x)], 0.6, {**OPTIONS, "update": "mod"})
    assert factors.info["losses"][-1] < factors.info["losses"][0]
