"""Prune to n of every m inputs: by a score (Wanda), or with surviving weights that compensate (SparseGPT)."""

import torch
from torch import Tensor

from cospadi.format.patterns import keep_largest, parse_pattern
from cospadi.solvers.feedback import feedback, refine, sweep


def wanda_support(rows: Tensor, gram: Tensor, pattern: str) -> Tensor:
    """Choose weights to keep by |weight| · RMS of its input (Wanda, arXiv 2306.11695, Eq. 1).

    Scores are compared within each run of m inputs of an output.

    Args:
        rows: (d_out, d_in).
        gram: (d_in, d_in).
        pattern: ``"n:m"``.

    Returns:
        bool (d_out, d_in).

    Raises:
        ValueError: if the pattern is not n:m.
    """
    _balanced(pattern)
    scale = gram.diagonal().clamp_min(0).sqrt().to(rows.dtype)
    return keep_largest(rows * scale, 0, pattern, dim=1)


def sparsegpt(
    rows: Tensor, gram: Tensor, pattern: str, *, damping: float = 0.01, reorder: bool = True, sweeps: int = 0
) -> tuple[Tensor, Tensor]:
    """Prune run by run; the weights of later runs compensate for pruned ones (SparseGPT, arXiv 2301.00774).

    When a run is processed, its weights have already been moved by earlier pruning. Those whose removal would raise the
    loss most are kept, by w² / [H⁻¹]_jj with H restricted to the inputs from j on.

    Args:
        rows: (d_out, d_in) float.
        gram: H, (d_in, d_in).
        pattern: ``"n:m"``.
        damping: added to the Gram's diagonal, as a share of its mean.
        reorder: process runs of high energy first, while most weights can still compensate; otherwise left to right.
        sweeps: passes of coordinate descent over the kept weights afterwards.

    Returns:
        the pruned rows (d_out, d_in), and their support, bool (d_out, d_in).

    Raises:
        ValueError: if the pattern is not n:m, or the Gram is not positive semi-definite.
    """
    n, m = _balanced(pattern)
    count, size = rows.shape
    order = _run_order(gram, m) if reorder else torch.arange(size, device=rows.device)
    plan = feedback(gram, damping, order, rows.dtype)
    keep = torch.zeros(size, count, dtype=torch.bool, device=rows.device)
    weights = rows.T[order]

    def choose(targets: Tensor, start: int) -> Tensor:
        run = slice(start, start + len(targets))
        # Targets assume that earlier inputs of the run are unchanged; let the whole run move to its optimum.
        moves: Tensor = torch.linalg.solve_triangular(
            plan.coupling[run, run].T, targets - weights[run], upper=False, unitriangular=True
        )
        moved = weights[run] + moves
        cost = moved.square() * plan.cost[run, None]
        keep[run] = keep_largest(cost, -(-n * len(targets) // m))
        return moved

    def decide(target: Tensor, step: int) -> Tensor:
        return target * keep[step]

    pruned = sweep(rows, plan, decide, m, choose)
    support = torch.zeros_like(keep)
    support[order] = keep
    support = support.T.contiguous()
    if sweeps:
        pruned = refine(rows, pruned, gram, lambda target, _: target, sweeps=sweeps, support=support, damping=damping)
    return pruned, support


def _balanced(pattern: str) -> tuple[int, int]:
    balanced = parse_pattern(pattern)
    if balanced is None:
        raise ValueError("pruning needs a pattern n:m, not 'free'")
    return balanced


def _run_order(gram: Tensor, m: int) -> Tensor:
    """Inputs in runs of m, runs by decreasing energy; a shorter last run stays last."""
    size = gram.shape[0]
    whole = size // m * m
    energy = gram.diagonal()[:whole].view(-1, m).sum(1)
    runs = torch.arange(whole, device=gram.device).view(-1, m)[energy.argsort(descending=True, stable=True)]
    return torch.cat([runs.ravel(), torch.arange(whole, size, device=gram.device)])
