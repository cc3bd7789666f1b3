"""Round sparse codes to a grid, each column under the exact Hessian of its own support, using matrix products only.

Minimises ‖Y − D Cᵀ‖² over grid values of C on a fixed support. GPTQ's error feedback would need one Cholesky factor per
column, since every column has its own support. Instead the atoms are rounded in a few chunks. After each chunk the
codes that are still free are solved again by conjugate gradients, for all columns at once. Sweeps of exact coordinate
descent on the grid follow; they never raise the error.
"""

import torch
from torch import Tensor

from cospadi.solvers.grid import Grid
from cospadi.solvers.linalg import restricted_least_squares


def round_codes(
    codes: Tensor,
    mask: Tensor,
    gram: Tensor,
    right: Tensor,
    grid: Grid,
    *,
    chunks: int = 8,
    solves: int = 6,
    sweeps: int = 2,
    block: int = 64,
) -> Tensor:
    """Round codes to a grid with error feedback.

    Args:
        codes: C (n, k), close to the least-squares solution on the support.
        mask: bool (n, k), the support.
        gram: DᵀD (k, k).
        right: YᵀD (n, k).
        grid: one grid per entry, (n, k), see :meth:`cospadi.solvers.grid.Grid.spread`.
        chunks: number of parts in which the atoms are rounded; the free codes are solved again after each.
        solves: conjugate-gradient steps per chunk.
        sweeps: passes of coordinate descent afterwards.
        block: atoms whose correlations are updated by one matrix product.

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


def _descend(codes: Tensor, mask: Tensor, gram: Tensor, right: Tensor, grid: Grid, atoms: slice, block: int) -> Tensor:
    """Set the codes of one atom after another to the best grid values, all others held fixed."""
    codes = codes.clone()
    diagonal = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    every = slice(None)
    for start in range(atoms.start, atoms.stop, block):
        stop = min(start + block, atoms.stop)
        correlation = (right[:, start:stop] - codes @ gram[:, start:stop]).T.contiguous()
        local = gram[start:stop, start:stop]
        for atom in range(start, stop):
            here = atom - start
            target = codes[:, atom] + correlation[here] / diagonal[atom]
            best = grid.at(every, atom).snap(target) * mask[:, atom]
            change = best - codes[:, atom]
            codes[:, atom] = best
            correlation[here:] -= local[here:, here, None] * change
    return codes
