"""What the low-rank methods have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cospadi.format import Factors, GroupSpec, Stored
from cospadi.methods.base import Problem
from cospadi.methods.cost import Sizes, Work, eigen, product, whitening
from cospadi.solvers.low_rank import fit_codes, unit_variance
from cospadi.solvers.whitening import Whitening, cholesky_whitening


def stacked(problem: Problem) -> Tensor:
    """The weights of all modules side by side, (d_in, sum of d_out) float64."""
    return torch.cat([weight.double() for weight in problem.weights], 1)


def mean_gram(problem: Problem) -> Tensor:
    """The Gram of all modules' inputs together, (d_in, d_in) float64."""
    return torch.stack([gram.double() for gram in problem.grams]).mean(0)


def ridged_cholesky(problem: Problem, ridge: float) -> Whitening:
    """Whitening by the Cholesky factor of the mean Gram plus `ridge` times its mean diagonal."""
    gram = mean_gram(problem)
    jitter = ridge * gram.diagonal().mean()
    return cholesky_whitening(gram + jitter * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def module_codes(problem: Problem, dictionary: Tensor, ridge: float) -> Tensor:
    """Codes (k, sum of d_out) of a given dictionary by least squares, each module under its own inputs' Gram.

    A module's Gram gets `ridge` times the mean diagonal of all added, so that where its own inputs say nothing (or
    there were none, as for an expert that no token was routed to) the codes still follow the weights.
    """
    mean = mean_gram(problem).diagonal().mean()
    eye = torch.eye(len(dictionary), dtype=torch.float64, device=dictionary.device)
    extra = eye * (ridge * mean if mean > 0 else 1.0)
    codes = [fit_codes(dictionary, w, problem.gram_of(i).double() + extra) for i, w in enumerate(problem.weights)]
    return torch.cat(codes, 1)


def dense_factors(problem: Problem, spec: GroupSpec, dictionary: Tensor, codes: Tensor) -> Factors:
    """Factors of a dense dictionary and dense codes, atoms at unit variance, in the weights' dtype.

    Args:
        problem: the problem they solve.
        spec: the spec they were made for; both matrices must be dense and at 16 bits.
        dictionary: D (d_in, k).
        codes: S (k, sum of d_out).

    Raises:
        ValueError: if the spec asks for anything but dense 16-bit factors.
    """
    for part in (spec.dictionary, spec.codes):
        if part is None or part.sparse or part.bits != 16:
            raise ValueError(f"{problem.name}: low-rank methods make dense 16-bit factors, not {part}")
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
