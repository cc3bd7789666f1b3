"""Refit scales to integers that are already chosen, and integers to the new scales, alternately.

Rounding with error feedback fixes the scales beforehand, before it is known which weights will compensate for which
errors. Given the integers, a row is linear in its scales, ŵ = Σ_g s_g u_g, so the best scales solve one small system
per row, (u_gᵀ H u_h) s = u_gᵀ H w. A pass of coordinate descent then fits the integers to the new scales. Neither step
raises the error. The gain is largest at two bits, where clipping and rounding errors have the same magnitude.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cospadi.format.pack import integer_range
from cospadi.format.schema import Stored
from cospadi.solvers.feedback import damped, refine
from cospadi.solvers.grid import Grid
from cospadi.solvers.quantise import bfloat16_exact, grouped

MEMORY = 2**28
"""Bytes available for the systems of a batch of rows."""


def rescaled(
    rows: Tensor,
    quantised: Stored,
    *,
    bits: int,
    group: int,
    hessian: Tensor,
    rounds: int,
    damping: float = 0.01,
    half: bool = False,
) -> Stored:
    """Alternately refit the scales and the integers of a dense quantised matrix.

    Args:
        rows: the matrix to approximate, (count, n) float.
        quantised: its quantised form, on its grid.
        bits: of the integers.
        group: values per scale; 0: one scale per row.
        hessian: H (n, n): the loss of a row's error e is eᵀ H e.
        rounds: refits of scales and integers.
        damping: of the Hessian, as a share of its mean diagonal.
        half: the grids are in half steps. Zero points in floats say so, too.

    Returns:
        a quantised matrix. No row has a larger error under the damped Hessian than before.
    """
    assert quantised.scales is not None
    rows = rows.float()
    half = half or (quantised.zeros is not None and quantised.zeros.is_floating_point())
    low, high = integer_range(bits, quantised.zeros is None, half)
    if quantised.zeros is None:
        zeros = torch.full_like(quantised.scales, (low + high) / 2)
    else:
        zeros = quantised.zeros.to(rows.dtype)
    grid, matrix = Grid(quantised.scales, zeros, low, high, half), quantised.matrix
    curvature, size = damped(hessian, damping).to(rows.dtype), group or rows.shape[1]
    for _ in range(rounds):
        batch = max(1, MEMORY // (8 * grid.scales.shape[1] ** 2 + 16 * rows.shape[1]))
        parts = [
            _fitted(rows[at], matrix[at], grid.scales[at], curvature, size)
            for at in torch.arange(len(rows), device=rows.device).split(batch)  # type: ignore[no-untyped-call]
        ]
        grid = replace(grid, scales=torch.cat([scales for scales, _ in parts]))
        matrix = torch.cat([values for _, values in parts])
        matrix = refine(rows, matrix, hessian, grid.steps(rows.shape[1], size), sweeps=1, damping=damping)
    return Stored(matrix, grid.scales, quantised.zeros)


def _fitted(rows: Tensor, matrix: Tensor, scales: Tensor, curvature: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The best scales for given integers and the resulting matrix, row by row only where they are better."""
    count, columns = rows.shape
    groups = scales.shape[1]
    spread = scales.repeat_interleave(size, 1)[:, :columns]
    # halves where zero points are: a level less its zero point
    integers = torch.where(spread > 0, (2 * matrix / torch.where(spread > 0, spread, 1.0)).round() / 2, 0.0)
    parts = grouped(integers, size)
    right = (grouped(rows @ curvature, size) * parts).sum(-1)
    system = torch.empty(count, groups, groups, dtype=torch.float64, device=rows.device)
    for index in range(groups):
        begin, end = index * size, min((index + 1) * size, columns)
        image = grouped(integers[:, begin:end] @ curvature[begin:end], size)
        system[:, index] = (image * parts).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-9 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    found = bfloat16_exact(torch.linalg.solve(system, right.double()).to(rows.dtype))
    found = torch.where(found > 0, found, scales)
    trial = integers * found.repeat_interleave(size, 1)[:, :columns]
    better = (_losses(rows - trial, curvature) < _losses(rows - matrix, curvature))[:, None]
    return torch.where(better, found, scales), torch.where(better, trial, matrix)


def _losses(errors: Tensor, curvature: Tensor) -> Tensor:
    return ((errors @ curvature) * errors).sum(1)
