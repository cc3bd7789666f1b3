"""FWSVD: SVD weighted by Fisher information (Hsu et al., arXiv 2207.00112)."""

import torch

from cospadi.errors import CalibrationError
from cospadi.format import Factors, GroupSpec
from cospadi.methods._low_rank import dense_factors, low_rank_cost
from cospadi.methods._problem import stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import weighted


@method("fwsvd", paper="arXiv 2207.00112", plan=low_rank_plan, needs=("fisher",), cost=low_rank_cost)
def fwsvd(problem: Problem, spec: GroupSpec) -> Factors:
    """SVD with each input row weighted by the root of its summed Fisher information.

    A closed form exists only if all entries of a row have the same weight. The paper therefore sums the empirical
    Fisher information (the mean squared gradient) over a row, Î_i = Σ_j F_ij, and minimises ‖diag(√Î) (W − D S)‖_F.

    Raises:
        CalibrationError: if the problem has no Fisher information.
    """
    if len(problem.fisher) != len(problem.weights):
        raise CalibrationError(f"{problem.name}: fwsvd needs the Fisher information of every weight; collect it first")
    importance = torch.cat([fisher.double() for fisher in problem.fisher], 1).sum(1)
    return dense_factors(problem, spec, *weighted(stacked(problem), importance.sqrt(), spec.atoms))
