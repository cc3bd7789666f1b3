"""Round to nearest: the plain quantisation that every other method has to beat at equal bytes."""

from collections.abc import Mapping
from typing import Any

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import integer_plan, module_rows, stacked_rows, weight_rows
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Sizes, Work, grid
from cospadi.methods.ranges import Natural
from cospadi.solvers.quantise import quantise_rows


def rtn_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """The search for scales."""
    z = Sizes.of(spec)
    return grid(z.n, z.d, options["search"])


@method("rtn", plan=integer_plan, cost=rtn_cost, text=False)
def rtn(problem: Problem, spec: GroupSpec, *, search: Natural = 0) -> Factors:
    """Integers with group scales, every weight rounded to nearest.

    Args:
        problem: weights; the Grams are not used.
        spec: bits, group and symmetry.
        search: clipping ranges to try per group for the smallest squared error; 0: the grid spans all weights.
    """
    codes = spec.codes
    parts = [
        quantise_rows(
            rows, bits=codes.bits, group=codes.group, symmetric=codes.symmetric, half=codes.half, search=search
        )
        for rows in (weight_rows(problem) if not problem.grams else [rows for rows, _ in module_rows(problem)])
    ]
    return stacked_rows(parts, problem)
