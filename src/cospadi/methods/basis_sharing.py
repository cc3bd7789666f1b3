"""Basis Sharing: neighbouring layers share one basis (Wang et al., arXiv 2410.03765)."""

from cospadi.format import Factors, GroupSpec
from cospadi.methods._low_rank import dense_factors, low_rank_cost, module_codes, ridged_cholesky, stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import NonNegative
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import whitened


@method("basis_sharing", paper="arXiv 2410.03765", plan=low_rank_plan, grouping="cross_layer", cost=low_rank_cost)
def basis_sharing(problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6, update: bool = True) -> Factors:
    """One whitened basis for the same projection of neighbouring layers; each layer has its own coefficients.

    The weights stand side by side, their inputs' Grams are added, L is the root of the sum: SVD of L [W₁ … W_g].
    Siblings (one Gram for all modules) are the special case where this is exact.

    Args:
        problem: weights of all layers and a Gram for each, or one Gram for all.
        spec: the rank.
        ridge: added to the summed Gram, as a share of its mean diagonal.
        update: coefficients of each layer by least squares under its own Gram, as the paper does for high
            compression; it never raises a layer's own error.
    """
    dictionary, codes = whitened(stacked(problem), ridged_cholesky(problem, ridge), spec.atoms)
    if update:
        codes = module_codes(problem, dictionary, ridge)
    return dense_factors(problem, spec, dictionary, codes)
