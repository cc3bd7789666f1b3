"""ASVD: activation-aware SVD (Yuan et al., arXiv 2312.05821)."""

import torch

from cospadi.errors import CalibrationError
from cospadi.format import Factors, GroupSpec
from cospadi.methods._low_rank import dense_factors, low_rank_cost
from cospadi.methods._problem import stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import NonNegative
from cospadi.methods.sizing import low_rank_plan
from cospadi.solvers.low_rank import weighted


@method("asvd", paper="arXiv 2312.05821", plan=low_rank_plan, needs=("mean_abs",), cost=low_rank_cost)
def asvd(problem: Problem, spec: GroupSpec, *, alpha: NonNegative = 0.5) -> Factors:
    """SVD with each input row scaled by a power of its mean absolute activation.

    Minimises ‖diag(a^α) (W − D S)‖_F with a_i = mean |x_i|.

    Args:
        problem: weights and mean absolute activations.
        spec: the rank.
        alpha: the power; 0 is the plain SVD, the paper uses 0.5.

    Raises:
        CalibrationError: if the problem has no mean absolute activations.
    """
    if not problem.mean_abs:
        raise CalibrationError(f"{problem.name}: asvd needs the mean absolute activations; collect them first")
    mean_abs = torch.stack([mean.double() for mean in problem.mean_abs]).mean(0)
    return dense_factors(problem, spec, *weighted(stacked(problem), mean_abs**alpha, spec.atoms))
