"""SVD-LLM: truncation-aware data whitening (Wang et al., arXiv 2403.07378)."""

from dataclasses import replace

from cospadi.format import Factors, GroupSpec, Stored
from cospadi.methods._low_rank import dense_factors, low_rank_cost, module_codes, problem_whitening
from cospadi.methods._problem import stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import NonNegative
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import whitened


@method(
    "svd_llm",
    paper="arXiv 2403.07378",
    plan=low_rank_plan,
    cost=low_rank_cost,
    sequential="sequential_update",
)
def svd_llm(
    problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6, sequential_update: bool = False
) -> Factors:
    """SVD of the whitened weights: the rank-r product with the smallest output error.

    With LᵀL = G, minimises ‖L (W − D S)‖_F. The output error of dropping a singular value is exactly that value.

    Args:
        problem: weights and Grams.
        spec: the rank.
        ridge: added to the Gram before its Cholesky factorisation, as a share of its mean diagonal. The paper adds it
            only if the factorisation fails, but then a nearly singular Gram leads to atoms that 16 bits cannot hold.
        sequential_update: the paper's second step. Layers are compressed in order; the dictionary comes from the
            original model's Gram, and the codes are solved again by least squares under the Gram of the inputs that
            the compressed layers before leave. The dictionary is first rounded to bfloat16, so the codes also
            compensate for that rounding and for the ridge.
    """
    dense = replace(problem, grams=problem.dense_grams) if sequential_update and problem.dense_grams else problem
    dictionary, codes = whitened(stacked(problem), problem_whitening(dense, ridge), spec.atoms)
    factors = dense_factors(dense, spec, dictionary, codes)
    if not sequential_update or factors.dictionary is None:
        return factors
    rounded = factors.dictionary.matrix.bfloat16()
    codes = module_codes(problem, rounded.T.double(), ridge).T.contiguous()
    dtype = factors.dictionary.matrix.dtype
    return Factors(codes=Stored(codes.to(dtype)), dictionary=Stored(rounded.to(dtype)))
