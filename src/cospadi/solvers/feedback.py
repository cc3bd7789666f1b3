"""Error feedback: inputs are rounded or zeroed one after another, and later inputs compensate for earlier errors.

For a row w and a Hessian H the loss of a changed row q is eᵀ H e with e = w − q. Write H = A Aᵀ with A upper
triangular, inputs in the order of processing; then eᵀ H e = Σ_j A_jj² (e_j + Σ_{i<j} e_i C_ij)², C_ij = A_ij / A_jj.
Whatever happened to the inputs before j, the best value for input j is therefore its *target* w_j + Σ_{i<j} e_i C_ij,
and missing the target by δ adds A_jj² δ² to the loss, which no later input can recover. This is the recursion of GPTQ
(arXiv 2210.17323) and SparseGPT (arXiv 2301.00774), equivalently Babai's nearest-plane algorithm, from a single
Cholesky factor and without a matrix inverse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cospadi.solvers.grid import GridSteps

if TYPE_CHECKING:
    from cospadi.solvers.triton_feedback import BlockKernels

Decide = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Feedback:
    """How the errors of earlier inputs move the targets of later ones.

    Attributes:
        order: (n,) the input processed at each step.
        coupling: C (n, n) strictly upper triangular, in processing order.
        cost: (n,) A_jj², the loss of missing the j-th target by one.
    """

    order: Tensor
    coupling: Tensor
    cost: Tensor


INDEFINITE = "the Hessian is not positive semi-definite, or holds NaN"
MOST_DAMPING = 1.0


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian plus `damping` times its mean diagonal, in float64; the identity if the Hessian is all zero.

    Raises:
        ValueError: if the mean diagonal is negative or not finite.
    """
    hessian = hessian.double()
    eye = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    mean = float(hessian.diagonal().mean())
    if not 0 <= mean < float("inf"):
        raise ValueError(INDEFINITE)
    return hessian + damping * mean * eye if mean > 0 else eye


def importance_order(hessian: Tensor) -> Tensor:
    """Inputs (n,) by decreasing diagonal: the most important are decided while most others can still compensate."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def upper_factor(hessian: Tensor) -> tuple[Tensor, bool]:
    """Upper triangular A with A Aᵀ = H for matrices (…, n, n), and whether the factorisation failed."""
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(-2, -1))  # reversed back, its factor is upper triangular
    return factor.flip(-2, -1), bool(failed.any())


def feedback(
    hessian: Tensor, damping: float = 0.01, order: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Feedback:
    """Factorise a Hessian for error feedback.

    Args:
        hessian: (n, n) symmetric positive semi-definite.
        damping: added to the diagonal, as a share of its mean; multiplied by ten until the Cholesky factor exists.
        order: (n,) permutation, the first input processed first; None: :func:`importance_order`.
        dtype: of the coupling. The factorisation always runs in float64.

    Raises:
        ValueError: if the Hessian is far from positive semi-definite, or holds NaN.
    """
    if order is None:
        order = importance_order(hessian)
    while True:
        factor, failed = upper_factor(damped(hessian, damping)[order][:, order])
        if not failed:
            pivots = factor.diagonal()
            return Feedback(order, (factor / pivots).triu(1).to(dtype), pivots.square().to(dtype))
        damping = more_damping(damping)


def more_damping(damping: float) -> float:
    """Ten times the damping, for the next attempt.

    Raises:
        ValueError: beyond `MOST_DAMPING`: a matrix that needs that much is not a Hessian, even up to rounding.
    """
    damping = max(damping, 1e-9) * 10
    if damping > MOST_DAMPING:
        raise ValueError(INDEFINITE)
    return damping


def block_kernels(rows: Tensor, grid: object) -> "BlockKernels | None":
    """The kernels that decide a block of inputs at once, or None if inputs have to be decided one by one."""
    if not isinstance(grid, GridSteps) or not rows.is_cuda or rows.dtype != torch.float32:
        return None
    try:
        from cospadi.solvers.triton_feedback import BlockKernels, runs_on
    except ImportError:
        return None
    return BlockKernels(grid) if runs_on(rows.device) else None


def sweep(
    rows: Tensor, plan: Feedback, decide: Decide | GridSteps, block: int = 128, begin: Decide | None = None
) -> Tensor:
    """Process all inputs in order with error feedback.

    Args:
        rows: (count, n) weights, outputs in rows, inputs in model order.
        plan: from :func:`feedback`.
        decide: ``decide(targets (count,), step) -> values (count,)``, which chooses the values of the input of that
            step. Alternatively grids: every input then goes to the nearest grid value, and a whole block runs in one
            kernel where possible (float32 on a GPU).
        block: inputs per block. Couplings within a block are applied input by input, those of earlier blocks as one
            matrix product.
        begin: ``begin(targets (width, count), step)``, called at the start of a block with its targets as earlier
            blocks determine them. The return value is ignored.

    Returns:
        the new rows (count, n), inputs in model order.
    """
    weights = rows.T[plan.order].contiguous()  # the weights of one input are adjacent
    errors, values = torch.zeros_like(weights), torch.zeros_like(weights)
    coupling = plan.coupling.to(weights.dtype).T.contiguous()
    kernels = block_kernels(weights, decide)
    if isinstance(decide, GridSteps):
        decide = decide.decide(plan.order.tolist())
    for start in range(0, len(weights), block):
        stop = min(start + block, len(weights))
        targets = weights[start:stop] + coupling[start:stop, :start] @ errors[:start]
        if begin is not None:
            begin(targets, start)
        if kernels is not None:
            at = slice(start, stop)
            values[at], errors[at] = kernels.sweep_block(targets, weights[at], coupling[at, at], plan.order[at])
            continue
        for step in range(start, stop):
            target = targets[step - start] + coupling[step, start:step] @ errors[start:step]
            values[step] = decide(target, step)
            errors[step] = weights[step] - values[step]
    result = torch.empty_like(weights)
    result[plan.order] = values
    return result.T.contiguous()


def refine(
    rows: Tensor,
    values: Tensor,
    hessian: Tensor,
    decide: Decide | GridSteps,
    *,
    sweeps: int,
    support: Tensor | None = None,
    damping: float = 0.01,
    block: int = 64,
) -> Tensor:
    """Cyclic coordinate descent on eᵀ H e: each input in turn takes its best value given all others.

    No sweep raises the loss if `decide` returns the nearest admissible value. QuantEase (arXiv 2309.01885) is this
    descent for dense weights.

    Args:
        rows: (count, n), the weights to approximate.
        values: (count, n), the approximation to start from.
        hessian: H, (n, n).
        decide: ``decide(targets (count,), input) -> values (count,)``, or grids as in :func:`sweep`.
        sweeps: passes over all inputs.
        support: bool (count, n); values outside it do not change. None: all may change.
        damping: as in :func:`feedback`.
        block: inputs per block. Changes within a block are applied input by input.

    Returns:
        the new values (count, n).
    """
    curvature = damped(hessian, damping).to(rows.dtype)
    values = values.T.clone(memory_format=torch.contiguous_format)
    errors = rows.T - values
    mask = None if support is None else support.T.contiguous()
    kernels = block_kernels(rows, decide) if support is None else None
    if isinstance(decide, GridSteps):
        decide = decide.decide(range(len(values)))
    for start in [*range(0, len(values), block)] * sweeps:
        stop = min(start + block, len(values))
        near = curvature[start:stop, start:stop]
        slope = curvature[start:stop] @ errors
        if kernels is not None:
            at = slice(start, stop)
            values[at], errors[at] = kernels.refine_block(values[at], errors[at], slope, near, at)
            continue
        for j in range(start, stop):
            new = decide(values[j] + slope[j - start] / near[j - start, j - start], j)
            change = new - values[j] if mask is None else (new - values[j]) * mask[j]
            values[j] = new if mask is None else torch.where(mask[j], new, values[j])
            errors[j] -= change
            slope[j - start + 1 :] -= near[j - start + 1 :, j - start, None] * change
    return values.T.contiguous()


def sweep_supports(
    rows: Tensor,
    support: Tensor,
    hessian: Tensor,
    snap: Callable[[Tensor, Tensor, Tensor], Tensor],
    damping: float = 0.01,
    memory: int = 2**28,
) -> Tensor:
    """Error feedback for sparse rows: each row is processed under the exact Hessian of its own support.

    Args:
        rows: (count, n), zero outside the support.
        support: bool (count, n) with the same number s of inputs in every row.
        hessian: (n, n).
        snap: ``snap(targets (c,), rows (c,), inputs (c,)) -> values (c,)``.
        damping: as in :func:`feedback`.
        memory: bytes available for the Hessians of a batch of rows.

    Returns:
        the new rows (count, n), zero outside the support.

    Raises:
        ValueError: if the Hessian is far from positive semi-definite, or holds NaN.
    """
    order = importance_order(hessian)
    count, size = rows.shape[0], int(support[0].sum())
    inputs = order.expand(count, -1)[support[:, order]].view(count, size)
    weights = rows.gather(1, inputs)
    result = torch.zeros_like(rows)
    whole = damped(hessian, damping)
    batch = max(1, memory // (8 * size * size))
    for start in range(0, count, batch):
        at = torch.arange(start, min(start + batch, count), device=rows.device)
        mine = inputs[at]
        factor, failed = upper_factor(whole[mine[:, :, None], mine[:, None, :]])
        while failed:
            damping = more_damping(damping)
            whole = damped(hessian, damping)
            factor, failed = upper_factor(whole[mine[:, :, None], mine[:, None, :]])
        coupling = (factor / factor.diagonal(dim1=1, dim2=2)[:, None, :]).mT.to(rows.dtype).contiguous()
        errors, values = torch.zeros_like(weights[at]), torch.zeros_like(weights[at])
        for step in range(size):
            target = weights[at, step] + (coupling[:, step, :step] * errors[:, :step]).sum(1)
            values[:, step] = snap(target, at, mine[:, step])
            errors[:, step] = weights[at, step] - values[:, step]
        result[at] = result[at].scatter(1, mine, values)
    return result
