"""Shared by the sparse-dictionary methods: plans, and factors in storage orientation."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from cospadi.format import Factors, GroupShape, GroupSpec, Stored
from cospadi.methods.ranges import AtomsPerNonzero
from cospadi.methods.sizing import largest, sparse_dictionary_plan


def stored(dictionary: Tensor, codes: Tensor, losses: Sequence[float], scale: float = 1.0) -> Factors:
    """Factors in storage orientation, with the numbers that the report shows.

    Args:
        dictionary: D (d_in, k), no longer whitened.
        codes: S (k, d_out).
        losses: squared error after each round.
        scale: squared norm of the target, to which the errors are relative.
    """
    info: dict[str, object] = {"rounds": len(losses)}
    if losses:
        info["losses"] = [losses[0] / (scale or 1.0), losses[-1] / (scale or 1.0)]
    return Factors(codes=Stored(codes.T.contiguous()), dictionary=Stored(dictionary.T.contiguous()), info=info)


def complete_dictionary_plan(shape: GroupShape, budget: int, *, rho: AtomsPerNonzero = 2.0) -> GroupSpec:
    """CoSpaDi's plan for methods whose dictionary has at most d_in atoms.

    If s = k/rho would take more than d_in atoms, the dictionary has d_in atoms and the rest of the budget goes to
    non-zeros, so the actual rho is smaller than requested.

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
