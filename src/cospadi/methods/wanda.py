"""Wanda: pruning by weights and activations (Sun et al., arXiv 2306.11695)."""

from collections.abc import Mapping
from typing import Any

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import module_rows, pruned_rows, pruning_plan, stacked_rows, survivors
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import CHOOSING, Sizes, Work
from cospadi.solvers.prune import wanda_support


def wanda_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Choosing the support; rounding what is left."""
    z = Sizes.of(spec)
    return Work(moved=CHOOSING * z.n * z.d, kernels=20) + survivors(z, hessian=False)


@method("wanda", paper="arXiv 2306.11695", plan=pruning_plan, cost=wanda_cost)
def wanda(problem: Problem, spec: GroupSpec) -> Factors:
    """Keeps n of every m weights by |weight| · RMS of its input, and changes none of them.

    Args:
        problem: weights and Grams.
        spec: the pattern; integer survivors are rounded to nearest.
    """
    parts = []
    for rows, gram in module_rows(problem):
        support = wanda_support(rows, gram, spec.codes.pattern)
        parts.append(pruned_rows(rows * support, support, spec.codes))
    return stacked_rows(parts, problem)
