"""Rounding sparse codes to a grid, every column under the exact Hessian of its own support, by matrix products only.

Minimise ‖Y − D Cᵀ‖² over grid values of C on a fixed support. Error feedback as GPTQ does it would need a Cholesky
factor for every column, since every support is another. Instead the atoms are rounded in a few chunks; after each, the
codes that are still free are solved again by conjugate gradients, all columns at once; sweeps of exact coordinate
descent on the grid follow, in which no step can raise the error.
"""

import torch
from torch import Tensor

from cospadi.solvers.grid import Grid
from cospadi.solvers.linalg import restricted_least_squares


class CodeGrid:
    """The grid of every stored value, spread to the places of the values.

    Args:
        grid: scales and zero points per group of stored values.
        mask: bool (n, k), the same number of stored values in every row.
        group: stored values per scale; 0: the whole row.
    """

    def __init__(self, grid: Grid, mask: Tensor, group: int) -> None:
        size = group or int(mask[0].sum())
        place = ((mask.cumsum(1) - 1).clamp_min(0) // size).clamp_max(grid.scales.shape[1] - 1)
        self.step = grid.scales.gather(1, place)
        self.zero = grid.zeros.gather(1, place)
        self.low, self.high = grid.low, grid.high

    def snap(self, values: Tensor, columns: slice | int) -> Tensor:
        """Nearest grid values of some columns."""
        step, zero = self.step[:, columns], self.zero[:, columns]
        safe = torch.where(step > 0, step, 1.0)
        return ((values / safe).round().add(zero).clamp(self.low, self.high) - zero) * step


def round_codes(
    codes: Tensor,
    mask: Tensor,
    gram: Tensor,
    right: Tensor,
    grid: CodeGrid,
    *,
    chunks: int = 8,
    solves: int = 6,
    sweeps: int = 2,
    block: int = 64,
) -> Tensor:
    """Round codes to a grid with error feedback.

    Args:
        codes: C (n, k), near the least squares solution on the support.
        mask: bool (n, k).
        gram: DᵀD (k, k).
        right: YᵀD (n, k).
        grid: of the stored values.
        chunks: parts of the atoms rounded one after another, the rest solved again in between.
        solves: conjugate-gradient steps in between.
        sweeps: of coordinate descent afterwards.
        block: atoms whose correlations are updated by one product.

    Returns:
        (n, k), on the grid inside the mask, zero outside.
    """
    k = codes.shape[1]
    free = mask.clone()
    for start in range(0, k, -(-k // chunks)):
        stop = min(start + -(-k // chunks), k)
        codes = _descend(codes, mask, gram, right, grid, slice(start, stop), block)
        free[:, start:stop] = False
        if stop < k:
            codes = restricted_least_squares(gram, right, codes, free, iterations=solves, dim=1)
    for _ in range(sweeps):
        codes = _descend(codes, mask, gram, right, grid, slice(0, k), block)
    return codes


def _descend(
    codes: Tensor, mask: Tensor, gram: Tensor, right: Tensor, grid: CodeGrid, atoms: slice, block: int
) -> Tensor:
    """Set one atom's codes after another to the best grid values, all others held."""
    codes = codes.clone()
    diagonal = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    for start in range(atoms.start, atoms.stop, block):
        stop = min(start + block, atoms.stop)
        correlation = (right[:, start:stop] - codes @ gram[:, start:stop]).T.contiguous()
        local = gram[start:stop, start:stop]
        for atom in range(start, stop):
            here = atom - start
            best = grid.snap(codes[:, atom] + correlation[here] / diagonal[atom], atom) * mask[:, atom]
            change = best - codes[:, atom]
            codes[:, atom] = best
            correlation[here:] -= local[here:, here, None] * change
    return codes
