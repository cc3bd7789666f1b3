"""SparseGPT: pruning with second-order error feedback (Frantar and Alistarh, arXiv 2301.00774)."""

from collections.abc import Mapping
from typing import Any

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import module_rows, pruned_rows, pruning_plan, stacked_rows, survivors
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Sizes, Work, feedback
from cospadi.methods.ranges import Natural, NonNegative
from cospadi.solvers.prune import sparsegpt as prune


def sparsegpt_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Error feedback with a support of each row's own."""
    z = Sizes.of(spec)
    return feedback(z.n, z.d, options["sweeps"], block=32, gridded=False) + survivors(z, hessian=True)


@method("sparsegpt", paper="arXiv 2301.00774", plan=pruning_plan, cost=sparsegpt_cost)
def sparsegpt(
    problem: Problem, spec: GroupSpec, *, damping: NonNegative = 0.01, reorder: bool = True, sweeps: Natural = 2
) -> Factors:
    """Keeps n of every m weights; weights not yet decided compensate for each pruned one.

    Args:
        problem: weights and Grams.
        spec: the pattern; integer survivors are rounded with error feedback on each row's support.
        damping: of the Gram, as a share of its mean diagonal.
        reorder: process runs of high input energy first; otherwise left to right as in the paper.
        sweeps: passes of coordinate descent over the kept weights afterwards, which never raise the error; 0: none, as
            in the paper.
    """
    parts = []
    for rows, gram in module_rows(problem):
        pruned, support = prune(rows, gram, spec.codes.pattern, damping=damping, reorder=reorder, sweeps=sweeps)
        parts.append(pruned_rows(pruned, support, spec.codes, gram))
    return stacked_rows(parts, problem)
