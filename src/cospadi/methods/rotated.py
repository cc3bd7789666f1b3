"""Integers of rotated weights, one scale a row: QuaRot (arXiv 2404.00456) in blocks, with the rounding of GPTQ."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import cat

from cospadi.format import Factors, GroupShape, GroupSpec, MatrixSpec, Rotation, Stored
from cospadi.methods._rotated import rotated as rotate
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Work
from cospadi.methods.gptq import gptq_cost
from cospadi.methods.ranges import Natural, NonNegative
from cospadi.solvers.quantise import quantise_rows
from cospadi.solvers.rescale import rescaled


def rotated_plan(
    shape: GroupShape,
    budget: int,
    *,
    bits: Literal[0, 2, 3, 4, 8] = 0,
    group: Natural = 0,
    block: Literal[16, 32, 64, 128, 256] = 128,
    scales: bool = True,
) -> GroupSpec:
    """The most bits per weight within the budget.

    Args:
        shape: the layers.
        budget: bytes.
        bits: 8, 4, 3 or 2; 0: the most that fit.
        group: weights per scale; 0: one scale per row, which is enough once the weights are rotated.
        block: largest block of the rotation.
        scales: whether the rotation has scales, two bytes per input.
    """
    spec = None
    for width in [bits] if bits else [8, 4, 3, 2]:
        codes = MatrixSpec(sum(shape.d_out), shape.d_in, bits=width, group=group, half=width < 8)
        spec = GroupSpec(shape.modules, shape.d_in, shape.d_out, codes, rotation=Rotation(block, scales))
        if spec.bytes <= budget:
            break
    assert spec is not None  # the loop runs at least once
    return spec


def rotated_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """That of GPTQ; the rotation itself is next to nothing."""
    return gptq_cost(spec, {**options, "shifts": 0})


@method(
    "rotated",
    paper="QuaRot, arXiv 2404.00456",
    plan=rotated_plan,
    cost=rotated_cost,
    grouping="siblings",
    sequential=True,
)
def rotated(
    problem: Problem,
    spec: GroupSpec,
    *,
    damping: NonNegative = 0.01,
    search: Natural = 30,
    sweeps: Natural = 2,
    rescale: Natural = 3,
) -> Factors:
    """Integers of 8 to 2 bits on rotated weights, with error feedback; one scale per output instead of groups.

    Below 8 bits the levels are odd multiples of half a step: after a rotation weights are nearly normal, and a level at
    zero would be wasted.

    Args:
        problem: weights and Grams.
        spec: bits, group and rotation.
        damping: of the Gram, as a share of its mean diagonal.
        search: clipping ranges to try per scale.
        sweeps: passes of coordinate descent after the error feedback.
        rescale: rounds of refitting scales to integers and integers to scales.
    """
    turned, codes, parts = rotate(problem, spec), spec.codes, []
    grid: dict[str, Any] = {"bits": codes.bits, "group": codes.group, "half": codes.half, "damping": damping}
    for index, rows in enumerate(turned.rows):
        gram = turned.gram_of(index)
        found = quantise_rows(rows, symmetric=True, hessian=gram, search=search, sweeps=sweeps, **grid)
        parts.append(rescaled(rows, found, hessian=gram, rounds=rescale, **grid) if rescale else found)
    scales = cat([part.scales for part in parts if part.scales is not None])
    return Factors(Stored(cat([part.matrix for part in parts]), scales), rotation=turned.stored)
