"""GPTQ: rounding with second-order error feedback (Frantar et al., arXiv 2210.17323)."""

from collections.abc import Mapping
from typing import Any

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import integer_plan, module_rows, stacked_rows
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Sizes, Work, feedback, grid, numbers, product, sweep
from cospadi.methods.ranges import Natural, NonNegative
from cospadi.solvers.quantise import quantise_rows
from cospadi.solvers.rescale import MEMORY, rescaled


def gptq_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """The search for scales, error feedback, sweeps, rescaling."""
    z = Sizes.of(spec)
    (rescalings,) = numbers(options, "rescale")
    rounding = feedback(z.n, z.d, options["sweeps"])
    return grid(z.n, z.d, options["search"], options["shifts"]) + rounding + _rescaling(z) * rescalings


def _rescaling(z: Sizes) -> Work:
    """Scales of a row from a system of equations over its groups, then a sweep of coordinate descent."""
    groups = z.d / (z.group or z.d)
    system = Work(moved=12.0 * z.n * z.d * groups + 60.0 * z.n * groups**2, products=4.0 * z.n * groups**3 / 3)
    batches = max(1.0, z.n * (8 * groups**2 + 16 * z.d) / MEMORY)
    fit = system + batches * Work(kernels=10 * groups + 60)
    return 5 * product(z.n, z.d, z.d) + fit + sweep(z.n, z.d, 128)


@method("gptq", paper="arXiv 2210.17323", plan=integer_plan, cost=gptq_cost, sequential=True)
def gptq(
    problem: Problem,
    spec: GroupSpec,
    *,
    damping: NonNegative = 0.01,
    search: Natural = 30,
    weighting: NonNegative = 1.0,
    shifts: Natural = 1,
    sweeps: Natural = 2,
    rescale: Natural = 3,
) -> Factors:
    """Integers with group scales; weights not yet rounded compensate for each rounding error.

    Inputs are processed by decreasing energy. Scales are fixed beforehand, so no order is stored. As in the paper, each
    layer's Gram is that of its inputs from the already rounded layers. Without `search`, `shifts`, `sweeps` and
    `rescale` the solve is the paper's, too.

    Args:
        problem: weights and Grams.
        spec: bits, group, symmetry and half steps.
        damping: of the Gram, as a share of its mean diagonal.
        search: clipping ranges to try per group; 0: the grid spans all weights.
        weighting: power of the Gram's diagonal by which that search weights errors. 1 protects the inputs of large
            energy: on language models it has the lower perplexity, though 0.5 leaves the smaller layer error.
        shifts: zero points to try on either side of the one that spans the weights.
        sweeps: passes of coordinate descent afterwards, which never raise the error.
        rescale: rounds of refitting scales to integers and integers to scales.
    """
    codes, parts = spec.codes, []
    for rows, gram in module_rows(problem):
        found = quantise_rows(
            rows,
            bits=codes.bits,
            group=codes.group,
            symmetric=codes.symmetric,
            half=codes.half,
            hessian=gram,
            damping=damping,
            search=search,
            weighting=weighting,
            shifts=shifts,
            sweeps=sweeps,
        )
        if rescale:
            found = rescaled(
                rows,
                found,
                bits=codes.bits,
                group=codes.group,
                hessian=gram,
                rounds=rescale,
                damping=damping,
                half=codes.half,
            )
        parts.append(found)
    return stacked_rows(parts, problem)
