"""Plain truncated SVD of the weights: the data-free baseline (Eckart and Young, 1936)."""

from cospadi.format import Factors, GroupSpec
from cospadi.methods._low_rank import dense_factors, low_rank_cost
from cospadi.methods._problem import stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import truncated


@method("svd", paper="Eckart and Young, Psychometrika 1 (1936)", plan=low_rank_plan, cost=low_rank_cost, text=False)
def svd(problem: Problem, spec: GroupSpec) -> Factors:
    """Truncated SVD of the weights, without calibration.

    Minimises ‖W − D S‖_F. Several modules share one basis.
    """
    return dense_factors(problem, spec, *truncated(stacked(problem), spec.atoms))
