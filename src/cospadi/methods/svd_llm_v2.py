"""SVD-LLM V2: truncation by two eigen-decompositions (Wang et al., arXiv 2503.12340).

Its other half, budgets by theoretical truncation loss, is `cospadi.allocation.theoretical_loss`.
"""

from cospadi.format import Factors, GroupSpec
from cospadi.methods._low_rank import dense_factors, low_rank_cost
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import NonNegative
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import eigen_whitening, whitened


@method("svd_llm_v2", paper="arXiv 2503.12340", plan=low_rank_plan, cost=low_rank_cost, allocation="truncation")
def svd_llm_v2(problem: Problem, spec: GroupSpec, *, ridge: NonNegative = 1e-6) -> Factors:
    """SVD of weights whitened by the Gram's eigendecomposition instead of a Cholesky factor.

    With G = Q Λ Qᵀ the root is √Λ Qᵀ. In exact arithmetic the product equals that of SVD-LLM unless the Gram is
    singular.

    Args:
        problem: weights and Grams.
        spec: the rank.
        ridge: smallest eigenvalue allowed, as a share of the mean.
    """
    root = eigen_whitening(mean_gram(problem), ridge)
    return dense_factors(problem, spec, *whitened(stacked(problem), root, spec.atoms))
