"""GeoPair: the error of both layers falls with every round and beats the shared mean metric."""

from itertools import pairwise

import pytest
import torch
from dictionary_cases import calibration, decaying, gram, rebuilt, solve

from cospadi.format import pack
from cospadi.methods.base import GroupShape, get_method


def pair(d=24, n=(30, 30), seed=0):
    inputs = [calibration(300, d, seed=seed + i) for i in range(len(n))]
    return inputs, [decaying(d, m, seed=seed + 10 + i) for i, m in enumerate(n)]


def relative_error(inputs, weights, factors):
    approximate = rebuilt(factors).double().split([w.shape[1] for w in weights], dim=1)
    error = energy = 0.0
    for x, w, other in zip(inputs, weights, approximate, strict=True):
        error += float((x @ (w.double() - other)).square().sum() / len(x))
        energy += float((x @ w.double()).square().sum() / len(x))
    return error / energy


@pytest.mark.parametrize("n", [(33,), (30, 30), (20, 41), (17, 18, 19)])
def test_error_falls_with_every_round(n):
    inputs, weights = pair(n=n, seed=len(n))
    errors = []
    for rounds in (0, 1, 2, 4, 8, 16):
        spec, factors = solve("geopair", weights, [gram(x) for x in inputs], 0.6, {"rounds": rounds})
        errors.append(relative_error(inputs, weights, factors))
        assert factors.info["losses"][-1] == pytest.approx(errors[-1], rel=1e-3)
        assert ((factors.codes.matrix != 0).sum(1) == spec.codes.nonzeros).all()
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]


def test_distinct_metrics_beat_the_mean_metric():
    inputs, weights = pair(seed=30)
    grams = [gram(x) for x in inputs]
    own = relative_error(inputs, weights, solve("geopair", weights, grams, 0.6, {})[1])
    mean = relative_error(inputs, weights, solve("geopair", weights, [sum(grams) / 2], 0.6, {})[1])
    assert own < 0.9 * mean


def test_one_gram_for_siblings_equals_one_weight():
    inputs, weights = pair(n=(40,), seed=40)
    whole = solve("geopair", weights, [gram(inputs[0])], 0.6, {})[1]
    halves = solve("geopair", [weights[0][:, :15], weights[0][:, 15:]], [gram(inputs[0])], 0.6, {})[1]
    torch.testing.assert_close(rebuilt(whole), rebuilt(halves))


def test_equal_grams_equal_one_gram():
    inputs, weights = pair(n=(20, 20), seed=50)
    shared = solve("geopair", weights, [gram(inputs[0])], 0.6, {"rounds": 6})[1]
    doubled = solve("geopair", weights, [gram(inputs[0])] * 2, 0.6, {"rounds": 6})[1]
    errors = [relative_error([inputs[0]] * 2, weights, f) for f in (shared, doubled)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_atoms_have_unit_variance_on_calibration_text():
    inputs, weights = pair(seed=60)
    _, factors = solve("geopair", weights, [gram(x) for x in inputs], 0.6, {})
    energy = sum((x @ factors.dictionary.matrix.T).square().mean(0) for x in inputs) / 2
    torch.testing.assert_close(energy, torch.ones_like(energy))


def test_plan_and_overcomplete_dictionary():
    shape = GroupShape(("a", "b"), 16, (90, 90))
    spec = get_method("geopair").spec(shape, int(0.8 * shape.dense_bytes), {})
    assert spec.atoms > 16
    assert spec.atoms / spec.codes.nonzeros == pytest.approx(2.5, rel=0.1)
    inputs, weights = pair(d=16, n=(90, 90), seed=70)
    spec, factors = solve("geopair", weights, [gram(x) for x in inputs], 0.8, {})
    assert spec.atoms > 16 and relative_error(inputs, weights, factors) < 0.1
    assert set(pack(factors.codes, spec.codes)) == {"values", "mask"}


def test_float32_and_rank_deficient_grams():
    inputs = [calibration(9, 24, seed=80), calibration(200, 24, seed=81)]
    weights = [decaying(24, 30, seed=82), decaying(24, 30, seed=83)]
    grams = [gram(x) for x in inputs]
    wide = relative_error(inputs, weights, solve("geopair", weights, grams, 0.7, {})[1])
    narrow = solve("geopair", [w.float() for w in weights], grams, 0.7, {})[1]
    assert narrow.codes.matrix.dtype == narrow.dictionary.matrix.dtype == torch.float32
    assert relative_error(inputs, weights, narrow) < 1.2 * wide + 1e-4


@pytest.mark.parametrize("n", [(30,), (30, 30), (17, 18, 19)])
def test_a_text_that_repeats_itself(n):
    """One token over and over: Grams of rank one that float32 products leave slightly indefinite."""
    grams = []
    for i in range(len(n)):
        token = calibration(1, 48, seed=60 + i).float()
        noise = torch.randn(48, 48, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        grams.append((token.T @ token).double() + 1e-6 * token.square().mean() * (noise + noise.T))
        assert float(torch.linalg.eigvalsh(grams[-1] + 1e-6 * grams[-1].diagonal().mean() * torch.eye(48))[0]) < 0
    weights = [decaying(48, m, seed=70 + i) for i, m in enumerate(n)]
    factors = solve("geopair", weights, grams, 0.6, {"rounds": 4})[1]
    losses = factors.info["losses"]
    assert rebuilt(factors).isfinite().all() and losses[-1] <= losses[0] < 1


def errors_of_each(inputs, weights, factors):
    approximate = rebuilt(factors).double().split([w.shape[1] for w in weights], dim=1)
    return [
        float((x @ (w.double() - other)).square().sum() / (x @ w.double()).square().sum())
        for x, w, other in zip(inputs, weights, approximate, strict=True)
    ]


def test_the_relative_objective_does_not_sacrifice_the_weaker_weight():
    inputs, weights = pair(seed=60)
    weights[1] = weights[1] * 0.1
    grams = [gram(x) for x in inputs]
    plain = errors_of_each(inputs, weights, solve("geopair", weights, grams, 0.6, {})[1])
    fair = errors_of_each(inputs, weights, solve("geopair", weights, grams, 0.6, {"relative": True})[1])
    assert plain[1] > 1.5 * plain[0]
    assert fair[1] < 0.8 * plain[1] and sum(fair) < sum(plain)


def test_the_relative_objective_does_not_depend_on_the_units_of_a_weight():
    inputs, weights = pair(seed=61)
    grams = [gram(x) for x in inputs]
    same = errors_of_each(inputs, weights, solve("geopair", weights, grams, 0.6, {"relative": True})[1])
    weights[1] = weights[1] * 64
    scaled = errors_of_each(inputs, weights, solve("geopair", weights, grams, 0.6, {"relative": True})[1])
    assert scaled == pytest.approx(same, rel=1e-3)
