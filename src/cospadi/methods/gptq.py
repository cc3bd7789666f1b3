"""GPTQ: rounding with second-order error feedback (Frantar et al., arXiv 2210.17323)."""

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import integer_plan, module_rows, stacked_rows
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import Natural, NonNegative
from cospadi.solvers.quantise import quantise_rows
from cospadi.solvers.rescale import rescaled


@method("gptq", paper="arXiv 2210.17323", plan=integer_plan)
def gptq(
    problem: Problem,
    spec: GroupSpec,
    *,
    damping: NonNegative = 0.01,
    search: Natural = 30,
    shifts: Natural = 0,
    sweeps: Natural = 2,
    rescale: Natural = 0,
) -> Factors:
    """Integers with group scales; weights not yet rounded compensate for each rounding error.

    Inputs are processed by decreasing energy. Scales are fixed beforehand, so no order is stored.

    Args:
        problem: weights and Grams.
        spec: bits, group and symmetry.
        damping: of the Gram, as a share of its mean diagonal.
        search: clipping ranges to try per group; 0: the grid spans all weights, as in the paper.
        shifts: zero points to try on either side of the one that spans the weights.
        sweeps: passes of coordinate descent afterwards, which never raise the error; 0: none, as in the paper.
        rescale: rounds of refitting scales to integers and integers to scales; 0: none, as in the paper.
    """
    codes, parts = spec.codes, []
    for rows, gram in module_rows(problem):
        found = quantise_rows(
            rows,
            bits=codes.bits,
            group=codes.group,
            symmetric=codes.symmetric,
            hessian=gram,
            damping=damping,
            search=search,
            shifts=shifts,
            sweeps=sweeps,
        )
        if rescale:
            found = rescaled(
                rows, found, bits=codes.bits, group=codes.group, hessian=gram, rounds=rescale, damping=damping
            )
        parts.append(found)
    return stacked_rows(parts, problem)
