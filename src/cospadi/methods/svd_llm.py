"""SVD-LLM: truncation-aware data whitening (Wang et al., arXiv 2403.07378)."""

from cospadi.format import Factors, GroupSpec, Stored
from cospadi.methods._low_rank import dense_factors, low_rank_cost, module_codes, ridged_cholesky, stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import NonNegative
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import whitened


@method("svd_llm", paper="arXiv 2403.07378", plan=low_rank_plan, cost=low_rank_cost)
def svd_llm(
    problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6, sequential_update: bool = False
) -> Factors:
    """SVD of the whitened weights: the rank-r product of least output error.

    With LᵀL = G, minimises ‖L (W − D S)‖_F; dropping a singular value costs exactly that much output error.

    Args:
        problem: weights and Grams.
        spec: the rank.
        ridge: added to the Gram before its Cholesky factor, as a share of its mean diagonal. The paper adds it only
            where the factorisation fails; without it a nearly singular Gram gives atoms that 16 bits cannot hold.
        sequential_update: the paper's second step: codes again by least squares under the problem's own Gram, which
            is that of the compressed prefix where the engine compresses layer by layer. Done here for the dictionary
            as bfloat16 keeps it, so it makes good for that rounding and for the ridge, too.
    """
    dictionary, codes = whitened(stacked(problem), ridged_cholesky(problem, ridge), spec.atoms)
    factors = dense_factors(problem, spec, dictionary, codes)
    if not sequential_update or factors.dictionary is None:
        return factors
    rounded = factors.dictionary.matrix.bfloat16()
    codes = module_codes(problem, rounded.T.double(), ridge).T.contiguous()
    dtype = factors.dictionary.matrix.dtype
    return Factors(codes=Stored(codes.to(dtype)), dictionary=Stored(rounded.to(dtype)))
