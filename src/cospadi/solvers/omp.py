"""Orthogonal matching pursuit for many columns at once, efficient even for hundreds of non-zeros.

The selected atoms of a column are orthonormalised implicitly. With q_t the t-th orthonormalised atom, only its
correlations u_t = Dᵀ q_t with all atoms are stored. They follow from the Gram A = DᵀD alone,

    u_t = (A[:, j] − Σ_{i<t} u_i[j] u_i) / pivot,      pivot² = A[j, j] − Σ_{i<t} u_i[j]²,

which is a Cholesky factorisation of A with pivots that each column of the target chooses for itself. The correlations
of the residual lose one multiple of u_t per step, so the only system to solve is one triangular solve at the end. The
factorisation is that of Batch-OMP (Rubinstein, Zibulevsky, Elad, CS-2008-08). A step costs one pass over the u_i of a
column, t·k numbers, and gathers no k×t blocks of the Gram.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_CPU_BYTES = 8 << 20  # the u_i of a batch should stay in the processor's cache
_CUDA_SHARE = 16  # one sixteenth of the total memory, not of the free memory, so that batches are reproducible


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Compute float32 products in full float32: TF32's ten mantissa bits are too few for these recurrences."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def batch_omp(dictionary: Tensor, target: Tensor, nonzeros: int, batch: int = 8192) -> Tensor:
    """Approximate every column of `target` by exactly `nonzeros` atoms (CoSpaDi, arXiv 2509.22075, step a).

    Atoms that depend linearly on those already selected are skipped. If there are fewer than `nonzeros` independent
    atoms, the rest of the support holds zeros.

    Args:
        dictionary: D (d, k), unit-norm columns, float32 or float64.
        target: Y (d, n), same dtype and device.
        nonzeros: s, 0 < s <= k.
        batch: maximum number of columns at a time; fewer if s·k numbers per column would not fit in memory.

    Returns:
        codes S (k, n), the least-squares coefficients on the selected support.

    Raises:
        ValueError: if `nonzeros` is not in 1 … k.
    """
    atoms = dictionary.shape[1]
    if not 0 < nonzeros <= atoms:
        raise ValueError(f"cannot choose {nonzeros} of {atoms} atoms")
    batch = min(batch, max(1, _memory(target) // (nonzeros * atoms * target.element_size())))
    codes = torch.empty(atoms, target.shape[1], dtype=target.dtype, device=target.device)
    with exact_matmul():
        gram = dictionary.T @ dictionary
        for start in range(0, target.shape[1], batch):
            correlations = target[:, start : start + batch].T @ dictionary
            codes[:, start : start + batch] = _pursue(gram, correlations, nonzeros).T
    return codes


def _memory(tensor: Tensor) -> int:
    if tensor.device.type == "cuda":
        return int(torch.cuda.get_device_properties(tensor.device).total_memory) // _CUDA_SHARE
    return _CPU_BYTES


def _pursue(gram: Tensor, residual: Tensor, nonzeros: int) -> Tensor:
    """Codes (b, k) of one batch. `residual` (b, k) is Yᵀ D and is overwritten. Never synchronises with the device."""
    count, atoms = residual.shape
    threshold = 64 * torch.finfo(gram.dtype).eps
    # squared distance of every atom to the span of the selected ones; -inf once selected
    distance = gram.diagonal().expand(count, atoms).clone()
    basis = residual.new_empty(count, nonzeros, atoms)
    chosen = torch.empty(count, nonzeros, dtype=torch.int64, device=gram.device)
    amounts = residual.new_empty(count, nonzeros)
    for step in range(nonzeros):
        # dependent atoms rank below all independent ones, selected atoms below all others
        score = torch.where(distance > threshold, residual.abs(), distance - 1)
        best = score.argmax(1)
        at = best.unsqueeze(1)
        row = gram.index_select(0, best)
        if step:
            earlier = basis[:, :step]
            weights = earlier.gather(2, at.unsqueeze(2).expand(count, step, 1))
            row = torch.baddbmm(row.unsqueeze(1), weights.transpose(1, 2), earlier, alpha=-1).squeeze(1)
        pivot = row.gather(1, at)
        inverse = torch.where(pivot > threshold, pivot.clamp_min(threshold).rsqrt(), 0.0)  # 0: dependent, no effect
        row = row * inverse
        amount = residual.gather(1, at) * inverse
        residual.addcmul_(amount, row, value=-1)
        distance.addcmul_(row, row, value=-1).scatter_(1, at, -torch.inf)
        basis[:, step] = row
        chosen[:, step] = best
        amounts[:, step] = amount.squeeze(1)
    # the columns of the transposed Cholesky factor are the u_i at the selected atoms
    factor = basis.gather(2, chosen.unsqueeze(1).expand(count, nonzeros, nonzeros))
    diagonal = factor.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, 1.0))
    values = torch.linalg.solve_triangular(factor, amounts.unsqueeze(2), upper=True).squeeze(2)
    return torch.zeros_like(residual).scatter_(1, chosen, values)
