"""Shared by methods with an identity dictionary: plans, and the conversion of weights to stored codes."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from cospadi.format import Factors, GroupShape, GroupSpec, MatrixSpec, Stored
from cospadi.methods.base import Problem
from cospadi.methods.cost import Sizes, Work, grid, own_support
from cospadi.methods.ranges import FactorBits, Natural, PruningPattern
from cospadi.methods.sizing import largest
from cospadi.solvers.quantise import quantise_rows


def identity_spec(shape: GroupShape, **codes: object) -> GroupSpec:
    """A group whose codes are the weights themselves, stored as the keywords for `MatrixSpec` specify."""
    spec = MatrixSpec(sum(shape.d_out), shape.d_in, **codes)  # type: ignore[arg-type]
    return GroupSpec(shape.modules, shape.d_in, shape.d_out, spec)


def group_sizes(group: int, columns: int) -> list[int]:
    """The requested group size, then coarser ones by doubling, then the whole row (0)."""
    sizes = []
    while 0 < group < columns:
        sizes.append(group)
        group *= 2
    return [*sizes, 0]


def integer_plan(
    shape: GroupShape,
    budget: int,
    *,
    bits: Literal[0, 2, 3, 4, 8] = 0,
    group: Natural = 64,
    symmetric: bool | None = None,
    half: bool = False,
) -> GroupSpec:
    """The most bits per weight within the budget and, for that many bits, the smallest groups.

    Args:
        shape: the layers.
        budget: bytes.
        bits: 8, 4, 3 or 2; 0: the most that fit.
        group: weights per scale; 0: one scale per row. If it does not fit, coarser groups are tried before fewer bits.
        symmetric: no zero points. None: at 8 bits only, since with few levels none should be wasted.
        half: levels in half steps: zero points halfway between two levels, for one more bit per scale; without zero
            points 2^bits levels around zero, none of them zero. At 8 bits this applies only if `symmetric` is given.
    """
    spec = None
    for width in [bits] if bits else [8, 4, 3, 2]:
        even = width == 8 if symmetric is None else symmetric
        for size in group_sizes(group, shape.d_in):
            steps = half and (width < 8 or symmetric is not None)
            spec = identity_spec(shape, bits=width, group=size, symmetric=even, half=steps)
            if spec.bytes <= budget:
                return spec
    assert spec is not None  # the loops run at least once
    return spec


def pruning_plan(
    shape: GroupShape, budget: int, *, pattern: PruningPattern = "", bits: FactorBits = 16, group: Natural = 64
) -> GroupSpec:
    """The densest pattern n:32 within the budget, or the requested pattern.

    Args:
        shape: the layers.
        budget: bytes.
        pattern: ``"n:m"`` such as ``"2:4"``; empty: n of every 32, with n from the budget.
        bits: of the surviving weights: 16, 8, 4, 3 or 2.
        group: surviving weights per scale, for integers; 0: one scale per row.
    """

    def make(n: int) -> GroupSpec:
        run = pattern or f"{n}:32"
        return identity_spec(shape, pattern=run, bits=bits, group=group if bits <= 8 else 0)

    return largest(make, 1, 1 if pattern else 32, budget)


def weight_rows(problem: Problem) -> list[Tensor]:
    """The weights of all modules with outputs in rows, (sum of d_out, d_in), in a list of one."""
    return [torch.cat([weight.T for weight in problem.weights])]


def module_rows(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights with outputs in rows (d_out, d_in) and their inputs' Gram; modules that share a Gram come as one."""
    if len(problem.grams) == 1:
        yield weight_rows(problem)[0], problem.grams[0]
    else:
        for weight, gram in zip(problem.weights, problem.grams, strict=True):
            yield weight.T, gram


def pruned_rows(rows: Tensor, support: Tensor, codes: MatrixSpec, hessian: Tensor | None = None) -> Stored:
    """Pruned rows as they are stored: 16-bit floats, or integers, with error feedback if a Hessian is given."""
    if not codes.integer:
        return Stored(rows, support=support)
    return quantise_rows(
        rows,
        bits=codes.bits,
        group=codes.group,
        symmetric=codes.symmetric,
        half=codes.half,
        hessian=hessian,
        support=support,
        search=30,
        sweeps=2,
    )


def stacked_rows(parts: list[Stored], problem: Problem) -> Factors:
    """Factors with an identity dictionary: the modules' rows stacked, in the dtype of the weights."""

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Factors(
        Stored(
            torch.cat([part.matrix for part in parts]).to(problem.weights[0].dtype),
            stack([part.scales for part in parts]),
            stack([part.zeros for part in parts]),
            stack([part.support for part in parts]),
        )
    )


def survivors(z: Sizes, hessian: bool) -> Work:
    """Rounding what pruning left; with a Hessian on each row's own support."""
    if not z.codes_integer:
        return Work()
    return grid(z.n, z.d, 30) + (own_support(z, sweeps=2) if hessian else Work())
