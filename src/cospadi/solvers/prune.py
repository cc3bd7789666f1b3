"""Pruning to n of every m inputs: by a score (Wanda), or with the surviving weights making good for it (SparseGPT)."""

import torch
from torch import Tensor

from cospadi.format.patterns import keep_largest, parse_pattern
from cospadi.solvers.feedback import feedback, refine, sweep


def wanda_support(rows: Tensor, gram: Tensor, pattern: str) -> Tensor:
    """Weights to keep by |weight| times the root mean square of its input (Wanda, arXiv 2306.11695, Eq. 1).

    Scores are compared within an output and a run of m inputs.

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
    """Prune run by run; the weights of later runs make good for each pruned weight (SparseGPT, arXiv 2301.00774).

    As a run's turn comes, the weights (as moved by what was pruned before) are kept whose loss would cost the most:
    w² / [H⁻¹]_jj with H restricted to the inputs from j on.

    Args:
        rows: (d_out, d_in) float.
        gram: H, (d_in, d_in).
        pattern: ``"n:m"``.
        damping: added to the Gram's diagonal, as a share of its mean.
        reorder: runs of most energy first, while the most weights are left to make good; otherwise left to right.
        sweeps: passes of coordinate descent over the kept weights afterwards.

    Returns:
        the pruned rows (d_out, d_in), and the support, bool.

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
        # targets take the run's earlier inputs as unchanged; let all of the run move to where it is best
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
    """Inputs by runs of m, runs of most energy first; a last shorter run stays last."""
    size = gram.shape[0]
    whole = size // m * m
    energy = gram.diagonal()[:whole].view(-1, m).sum(1)
    runs = torch.arange(whole, device=gram.device).view(-1, m)[energy.argsort(descending=True, stable=True)]
    return torch.cat([runs.ravel(), torch.arange(whole, size, device=gram.device)])
