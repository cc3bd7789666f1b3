"""The project's own method: exact storage of every kind of factor, stable low-bit dictionaries, siblings."""

from functools import partial

import pytest
import torch

from cospadi.engine.factorise import output_error
from cospadi.methods import GroupShape, Problem, get_method
from cospadi.solvers.whitening import cholesky_whitening

METHOD = get_method("pursuit")


def layer(d_in: int, d_out: tuple[int, ...], seed: int, tokens: int = 400) -> tuple[Problem, GroupShape]:
    """Weights with a decaying spectrum and strongly anisotropic inputs, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(1, -2, d_in, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)).Q
    inputs = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) * scale @ mixing.T
    weights = tuple(torch.randn(d_in, n, generator=generator) / d_in**0.5 for n in d_out)
    gram = inputs.T @ inputs / tokens
    names = tuple(f"m{i}" for i in range(len(d_out)))
    return Problem("layer", weights, (gram,), seed=seed), GroupShape(names, d_in, d_out)


def stored_error(problem: Problem, shape: GroupShape, keep: float, **options) -> float:
    spec = METHOD.spec(shape, int(keep * shape.dense_bytes), options)
    assert spec.bytes <= keep * shape.dense_bytes
    plan = {"rho", "pattern", "dictionary_bits", "value_bits", "group"}
    solve = {"rounds": 8} | {k: v for k, v in options.items() if k not in plan}
    tensors = METHOD.factorise(problem, spec, solve).pack(spec, torch.bfloat16)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == spec.bytes
    missed, energy = output_error(torch.cat(problem.weights, 1), spec.weight(tensors), problem.grams[0])
    return missed / energy


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": "free", "rho": 3.0},
        {"value_bits": 14},
        {"value_bits": 8},
        {"value_bits": 8, "dictionary_bits": 8, "group": 0},
        {"value_bits": 4, "dictionary_bits": 4, "group": 16},
        {"value_bits": 3, "dictionary_bits": 8, "pattern": "24:32"},
    ],
)
def test_what_is_stored_is_what_was_solved(options):
    problem, shape = layer(48, (40, 12, 12), seed=1)
    spec = METHOD.spec(shape, int(0.6 * shape.dense_bytes), options)
    factors = METHOD.factorise(problem, spec, options | {"rounds": 8, "ridge": 1e-9})
    tensors = factors.pack(spec, torch.bfloat16)
    missed, energy = output_error(torch.cat(problem.weights, 1), spec.weight(tensors), problem.grams[0])
    assert missed / energy == pytest.approx(factors.info["whitened_error"], rel=0.03)


def test_whitened_error_equals_output_error():
    problem, _ = layer(20, (30,), seed=2)
    whitening = cholesky_whitening(problem.grams[0])
    approximation = problem.weights[0] + 0.1 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    miss = (problem.weights[0] - approximation).double()
    direct = output_error(problem.weights[0], approximation, problem.grams[0])[0]
    assert float(whitening.apply(miss).square().sum()) == pytest.approx(direct, rel=1e-6)


def test_eight_bit_dictionary_with_more_atoms_than_inputs_is_stable():
    problem, shape = layer(40, (160,), seed=3)
    spec = METHOD.spec(shape, int(0.8 * shape.dense_bytes), {"dictionary_bits": 8, "value_bits": 8})
    assert spec.atoms > 40
    sixteen = stored_error(problem, shape, 0.8)
    eight = stored_error(problem, shape, 0.8, dictionary_bits=8, value_bits=8)
    assert eight < sixteen


def test_siblings_beat_separate_dictionaries_at_the_same_bytes():
    problem, shape = layer(40, (48, 16, 16), seed=4)
    energy = output_error(torch.cat(problem.weights, 1), torch.zeros(40, 80), problem.grams[0])[1]
    together = energy * stored_error(problem, shape, 0.6)
    apart = 0.0
    for name, weight in zip(shape.modules, problem.weights, strict=True):
        alone = Problem(name, (weight,), problem.grams, seed=4)
        energy = output_error(weight, torch.zeros_like(weight), problem.grams[0])[1]
        apart += energy * stored_error(alone, GroupShape((name,), 40, (weight.shape[1],)), 0.6)
    assert together < apart


def test_rank_deficient_gram():
    problem, shape = layer(48, (64,), seed=5, tokens=10)
    assert stored_error(problem, shape, 0.6) < 1e-3  # ten directions matter, and the budget covers them


def test_balanced_codes_cost_little_against_free_ones():
    problem, shape = layer(192, (320,), seed=6)
    free = stored_error(problem, shape, 0.6, pattern="free", rounds=20)
    assert stored_error(problem, shape, 0.6, pattern="16:32", rounds=20) < 1.15 * free


def test_the_pattern_follows_the_number_of_atoms():
    plan = partial(METHOD.plan, GroupShape(("m0",), 64, (256,)))
    few, many = plan(int(0.5 * 2 * 64 * 256)), plan(int(0.8 * 2 * 64 * 256))
    assert few.codes.pattern == "12:32" and few.atoms <= 64
    assert many.codes.pattern == "16:32"
    assert plan(int(0.8 * 2 * 64 * 256), pattern="12:32").atoms > 64


@pytest.mark.parametrize("pattern", ["12:32", "16:32"])
def test_many_atoms_fill_mask_words(pattern):
    shape = GroupShape(("m",), 2048, (2048,))
    for keep in (0.2, 0.4, 0.45, 0.5, 0.6, 0.8):
        budget = int(keep * shape.dense_bytes)
        spec = METHOD.plan(shape, budget, pattern=pattern)
        exact = budget / (spec.bytes / spec.atoms)
        assert spec.bytes <= budget and exact - spec.atoms < 34
        assert (spec.atoms % 32 == 0) == (exact >= 640)  # fewer atoms would lose too much of the budget
