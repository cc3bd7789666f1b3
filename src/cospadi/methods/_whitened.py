"""What the sparse-dictionary methods have in common around their solvers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cospadi.format import Factors, GroupShape, GroupSpec, Stored
from cospadi.methods.base import Problem
from cospadi.methods.ranges import AtomsPerNonzero
from cospadi.methods.sizing import largest, sparse_dictionary_plan


def stacked(problem: Problem) -> Tensor:
    """The group's weights side by side, (d_in, sum of d_out)."""
    return torch.cat(problem.weights, dim=1)


def mean_gram(problem: Problem) -> Tensor:
    """The Gram, or the mean of several (d_in, d_in): CoSpaDi's shared metric, appendix A.4."""
    return torch.stack(problem.grams).mean(0) if len(problem.grams) > 1 else problem.grams[0]


def stored(dictionary: Tensor, codes: Tensor, losses: Sequence[float], scale: float = 1.0) -> Factors:
    """Factors in storage orientation, with a short account of the run.

    Args:
        dictionary: D (d_in, k), de-whitened.
        codes: S (k, d_out).
        losses: squared error after each round.
        scale: squared norm of what they are the error of.
    """
    info: dict[str, object] = {"rounds": len(losses)}
    if losses:
        info["losses"] = [losses[0] / (scale or 1.0), losses[-1] / (scale or 1.0)]
    return Factors(codes=Stored(codes.T.contiguous()), dictionary=Stored(dictionary.T.contiguous()), info=info)


def complete_dictionary_plan(shape: GroupShape, budget: int, *, rho: AtomsPerNonzero = 2.0) -> GroupSpec:
    """Like CoSpaDi's plan, for methods whose dictionary has at most d_in atoms.

    Where s = k/rho asks for more than d_in atoms, there are d_in of them and the rest of the budget goes to
    non-zeros, so that rho falls below what was asked for.

    Args:
        shape: the layers.
        budget: bytes.
        rho: atoms per non-zero.
    """
    spec = sparse_dictionary_plan(shape, budget, rho=rho)
    most = min(shape.d_in, sum(shape.d_out))
    if spec.atoms <= most or spec.dictionary is None:
        return spec
    dictionary = replace(spec.dictionary, rows=most)

    def make(nonzeros: int) -> GroupSpec:
        codes = replace(spec.codes, columns=most, nonzeros=nonzeros)
        return replace(spec, codes=codes, dictionary=dictionary)

    return largest(make, 1, most, budget)
