"""Problems for the tests of one-shot methods."""

import torch

from cospadi.format import pack, unpack
from cospadi.methods.base import GroupShape, Problem


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def make_problem(d_in, d_out, *, seed=0, tokens=None, grams=1, dtype=torch.float64):
    """Correlated inputs with a few loud channels; fewer tokens than channels give a rank-deficient Gram."""
    tokens = 4 * d_in if tokens is None else tokens
    inputs = []
    for index in range(grams):
        loud = 1 + 4 * (rand(d_in, seed=seed + index) > 1.2)
        inputs.append(rand(tokens, d_in, seed=seed + 10 + index) @ rand(d_in, d_in, seed=seed + 20 + index) * loud)
    return Problem(
        "case",
        tuple(rand(d_in, n, seed=seed + 30 + i).to(dtype) for i, n in enumerate(d_out)),
        tuple(x.T @ x / max(1, tokens) for x in inputs),
        tuple(x.abs().mean(0) if tokens else torch.zeros(d_in).double() for x in inputs),
        tuple(rand(d_in, n, seed=seed + 40 + i).square() for i, n in enumerate(d_out)),
    )


def shape_of(problem):
    return GroupShape(
        tuple(f"layer.{i}" for i in range(len(problem.weights))),
        problem.weights[0].shape[0],
        tuple(weight.shape[1] for weight in problem.weights),
    )


def product(factors):
    """The weights the factors stand for, (d_in, sum of d_out)."""
    codes = factors.codes.matrix
    return (codes if factors.dictionary is None else codes @ factors.dictionary.matrix.to(codes.dtype)).T.double()


def output_error(problem, approximate):
    """Mean squared output error per token, each module under its own Gram."""
    total, start = 0.0, 0
    for index, weight in enumerate(problem.weights):
        miss = weight.double() - approximate[:, start : start + weight.shape[1]]
        total += float((miss * (problem.gram_of(index) @ miss)).sum())
        start += weight.shape[1]
    return total


def round_trip(factors, spec, dtype=torch.bfloat16):
    """Both matrices as a checkpoint gives them back."""
    parts = [(factors.codes, spec.codes)]
    if spec.dictionary is not None:
        parts.append((factors.dictionary, spec.dictionary))
    for stored, part in parts:
        packed = pack(stored, part, dtype)
        assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == part.tensors(dtype)
        yield stored.matrix.float(), unpack(packed, part), part
