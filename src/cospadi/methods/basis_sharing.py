"""Basis Sharing: neighbouring layers share one basis (Wang et al., arXiv 2410.03765)."""

from cospadi.format import Factors, GroupSpec
from cospadi.methods._low_rank import dense_factors, low_rank_cost, module_codes, problem_whitening
from cospadi.methods._problem import stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import NonNegative
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import whitened


@method("basis_sharing", paper="arXiv 2410.03765", plan=low_rank_plan, grouping="cross_layer", cost=low_rank_cost)
def basis_sharing(problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6, update: bool = True) -> Factors:
    """One whitened basis for the same projection of neighbouring layers, with separate coefficients per layer.

    Takes the SVD of L [W₁ … W_g], where L is a root of the mean of the layers' Grams. For siblings, which share one
    Gram, this is exact.

    Args:
        problem: weights of all layers and a Gram for each, or one Gram for all.
        spec: the rank.
        ridge: added to the mean Gram, as a share of its mean diagonal.
        update: compute the coefficients of each layer by least squares under its own Gram, as the paper does for strong
            compression. This never raises the error of a layer.
    """
    dictionary, codes = whitened(stacked(problem), problem_whitening(problem, ridge), spec.atoms)
    if update:
        codes = module_codes(problem, dictionary, ridge)
    return dense_factors(problem, spec, dictionary, codes)
