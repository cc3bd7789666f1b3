"""Shared by the low-rank methods."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cospadi.format import Factors, GroupSpec, Stored
from cospadi.methods._problem import mean_gram
from cospadi.methods.base import Problem
from cospadi.methods.cost import Sizes, Work, eigen, product, whitening
from cospadi.solvers.low_rank import fit_codes, unit_variance
from cospadi.solvers.whitening import Whitening, cholesky_whitening


def problem_whitening(problem: Problem, ridge: float) -> Whitening:
    """Whitening by the Cholesky factor of the mean Gram, with `ridge` times its mean diagonal added."""
    gram = mean_gram(problem)
    jitter = ridge * gram.diagonal().mean()
    return cholesky_whitening(gram + jitter * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def module_codes(problem: Problem, dictionary: Tensor, ridge: float) -> Tensor:
    """Least-squares codes (k, sum of d_out) for a given dictionary, each module under the Gram of its own inputs.

    `ridge` times the mean diagonal of all Grams is added to each, so that the codes still follow the weights in
    directions that a module's inputs never excite (or if there were none, as for an expert that received no token).
    """
    mean = mean_gram(problem).diagonal().mean()
    eye = torch.eye(len(dictionary), dtype=torch.float64, device=dictionary.device)
    extra = eye * (ridge * mean if mean > 0 else 1.0)
    codes = [fit_codes(dictionary, w, problem.gram_of(i).double() + extra) for i, w in enumerate(problem.weights)]
    return torch.cat(codes, 1)


def dense_factors(problem: Problem, spec: GroupSpec, dictionary: Tensor, codes: Tensor) -> Factors:
    """Factors of a dense dictionary and dense codes in the weights' dtype, atoms scaled to unit variance.

    Args:
        problem: the problem they solve.
        spec: the spec they belong to; both matrices must be dense and 16-bit.
        dictionary: D (d_in, k).
        codes: S (k, sum of d_out).

    Raises:
        ValueError: if the spec demands anything but dense 16-bit factors.
    """
    for part in (spec.dictionary, spec.codes):
        if part is None or part.sparse or part.bits != 16:
            raise ValueError(f"{problem.name}: low-rank methods produce dense 16-bit factors, not {part}")
    dictionary, codes = unit_variance(dictionary, codes, mean_gram(problem))
    dtype = problem.weights[0].dtype
    return Factors(codes=Stored(codes.T.contiguous().to(dtype)), dictionary=Stored(dictionary.T.contiguous().to(dtype)))


def low_rank_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Two whitenings and one SVD; with an update also the codes by least squares."""
    z = Sizes.of(spec)
    work = 2 * whitening(z) + product(z.d, z.d, z.n, wide=True) + eigen(min(z.d, z.n))
    if options.get("update") or options.get("sequential_update"):
        work = work + z.modules * product(z.k, z.d, z.d, wide=True) + product(z.k, z.d, z.n, wide=True)
    return work + 4 * product(z.k, z.d, z.d, wide=True)
