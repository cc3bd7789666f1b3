"""Quantisers: fit integer grids with group scales, then round to nearest or with error feedback (GPTQ).

The stored values of a row form groups of `group` consecutive values. Each group has a scale and, for asymmetric grids,
a zero point: value = (level − zero) · scale. Scales are rounded to bfloat16 before values are rounded to them,
so the resulting matrix lies exactly on the grid that a checkpoint stores.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cospadi.format.pack import integer_range
from cospadi.format.schema import Stored
from cospadi.solvers.feedback import Decide, feedback, refine, sweep, sweep_supports
from cospadi.solvers.grid import Grid, GridSteps, group_of


def grouped(values: Tensor, group: int) -> Tensor:
    """Reshape (rows, n) to (rows, groups, group), padding the last group with zeros; group 0 is the whole row."""
    size = group or values.shape[1]
    return torch.nn.functional.pad(values, (0, -values.shape[1] % size)).view(values.shape[0], -1, size)


def bfloat16_exact(values: Tensor) -> Tensor:
    """Values rounded to bfloat16, as float32."""
    return values.to(torch.bfloat16).to(torch.float32)


def fit_grid(
    values: Tensor,
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    importance: Tensor | None = None,
    search: int = 0,
    shifts: int = 0,
    half: bool = False,
) -> Grid:
    """Choose scales and zero points for a matrix.

    Without search the grid spans the values and zero. With search, ranges shrunk in equal steps down to 30 % compete
    for the smallest weighted squared error, so that outliers are clipped where that pays.

    Args:
        values: (rows, n), the stored values in order.
        bits: 2 to 6, or 8.
        group: values per scale; 0: one scale per row.
        symmetric: levels symmetric about zero, no zero point.
        importance: weight of each squared error, (n,) or (rows, n); None: all equal.
        search: number of shrunk ranges to try.
        shifts: zero points to try on either side of the one that spans the values, for asymmetric grids with search.
            At two bits the four levels lie lopsided about zero, and the extremes do not tell which side is better.
        half: zero points may lie halfway between two levels; `shifts` then counts half steps. Where symmetric, all of
            them do: the 2^bits levels are ±½, ±3/2, … scales.

    Returns:
        the grid; the one that spans the values wherever no other is better.

    Raises:
        ValueError: if `bits` is neither 2 to 6 nor 8.
    """
    if bits not in (2, 3, 4, 5, 6, 8):
        raise ValueError(f"integers of {bits} bits are not supported, only 2 to 6 and 8")
    low, high = integer_range(bits, symmetric, half)
    unit = 0.5 if half else 1.0
    split = grouped(values.float(), group)
    bottom, top = split.amin(-1).clamp_max(0), split.amax(-1).clamp_min(0)
    if symmetric:
        zeros = torch.full_like(top, (low + high) / 2)
        span = torch.maximum(-bottom, top) / ((high - low) / 2)
    else:
        span = (top - bottom) / high
        zeros = (-bottom / torch.where(span > 0, span, 1.0) / unit).round().mul_(unit).clamp_(low, high)
    best = Grid(bfloat16_exact(span), zeros, low, high, half)
    if not search:
        return best
    weight = torch.ones_like(values[:1]) if importance is None else importance.expand(values.shape).float()
    weight = grouped(weight, group)
    error = ((best.snap(split) - split).square() * weight).sum(-1)
    sides = [0] if symmetric else sorted(range(-shifts, shifts + 1), key=abs)
    for shift in sides:
        moved = (zeros + shift * unit).clamp(low, high) if shift else zeros
        for step in range(0 if shift else 1, search + 1):
            trial = replace(best, scales=bfloat16_exact(span * (1 - 0.7 * step / search)), zeros=moved)
            missed = ((trial.snap(split) - split).square() * weight).sum(-1)
            better = missed < error
            error = torch.where(better, missed, error)
            scales = torch.where(better, trial.scales, best.scales)
            best = replace(best, scales=scales, zeros=torch.where(better, moved, best.zeros))
    return best


def quantise_rows(
    matrix: Tensor,
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    hessian: Tensor | None = None,
    support: Tensor | None = None,
    damping: float = 0.01,
    search: int = 0,
    shifts: int = 0,
    sweeps: int = 0,
    weighting: float = 0.5,
    half: bool = False,
) -> Stored:
    """Quantise a matrix with outputs in rows, with error feedback if a Hessian is given.

    The loss is Σ eᵀ H e over the rows' errors e. H is the Gram of the inputs for weights (d_out, d_in) and for a
    dictionary Dᵀ (atoms, d_in), and DᵀGD for codes Sᵀ (d_out, atoms).

    Grids are fixed beforehand from the given matrix. Inputs can therefore be processed by importance while groups stay
    consecutive ("static groups"), and no index is stored. Sparse rows are rounded under the exact Hessian of their own
    support.

    Args:
        matrix: (rows, columns) float, zero outside the support.
        bits: 2 to 6, or 8.
        group: stored values per scale; 0: one scale per row.
        symmetric: no zero points.
        hessian: (columns, columns); None: round to nearest.
        support: bool (rows, columns) with the same number of stored values in every row; None: dense.
        damping: of the Hessian, as a share of its mean diagonal.
        search: clipping ranges to try, see :func:`fit_grid`.
        shifts: additional zero points to try, see :func:`fit_grid`.
        sweeps: passes of coordinate descent after the error feedback.
        weighting: power of the Hessian's diagonal by which the search weights squared errors. The diagonal (1) is their
            weight before feedback; after it they weigh much less. 0.5 leaves the smaller loss, 1 keeps the inputs of
            largest energy exact, which measures better on language models.
        half: grids in half steps, see :func:`fit_grid`.

    Returns:
        the matrix, exactly on its grid, with float32 scales that are exact in bfloat16 and, unless symmetric, zero
        points: int32, or float32 where `half`.

    Raises:
        ValueError: if `bits` is neither 2 to 6 nor 8, or the Hessian is not positive semi-definite.
    """
    matrix = matrix.float()
    rows, columns = matrix.shape
    stored = matrix if support is None else matrix[support].view(rows, -1)
    importance = None
    if hessian is not None:
        diagonal = hessian.diagonal().clamp_min(0)
        importance = (diagonal**weighting).float().expand(rows, columns)
        importance = importance if support is None else importance[support].view(rows, -1)
    grid = fit_grid(
        stored,
        bits=bits,
        group=group,
        symmetric=symmetric,
        importance=importance,
        search=search,
        shifts=shifts,
        half=half,
    )
    if hessian is None:
        result = grid.snap(grouped(stored, group)).view(rows, -1)[:, : stored.shape[1]]
        if support is not None:
            result = torch.zeros_like(matrix).masked_scatter(support, result)
    else:
        result = _with_feedback(matrix, grid, group or stored.shape[1], hessian, support, damping, sweeps)
    zeros = None if symmetric else grid.zeros if half else grid.zeros.int()
    return Stored(result.contiguous(), grid.scales, zeros, support)


def _with_feedback(
    matrix: Tensor, grid: Grid, size: int, hessian: Tensor, support: Tensor | None, damping: float, sweeps: int
) -> Tensor:
    """Error feedback, then coordinate descent, on fixed grids of `size` stored values each."""
    decide: Decide | GridSteps
    if support is None:
        decide = grid.steps(matrix.shape[1], size)
        result = sweep(matrix, feedback(hessian, damping), decide)
    else:
        every = torch.arange(matrix.shape[0], device=matrix.device)
        place = group_of(support, size)
        decide = lambda target, column: grid.at(every, place[:, column]).snap(target)  # noqa: E731
        result = sweep_supports(
            matrix, support, hessian, lambda target, row, column: grid.at(row, place[row, column]).snap(target), damping
        )
    if not sweeps:
        return result
    return refine(matrix, result, hessian, decide, sweeps=sweeps, support=support, damping=damping)
