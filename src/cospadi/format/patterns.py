"""Projections onto sparse codes: keep the largest entries of every column.

Codes S have shape (k, d_out): a column holds the coefficients of one output. A *pattern* says where the
non-zeros of a column may lie:

* ``"free"``: anywhere;
* ``"n:m"``: exactly n in every run of m consecutive atoms. A last, shorter run of t atoms holds
  ceil(n·t/m), so that k need not be a multiple of m.
"""

import re

import torch
from torch import Tensor

GROUP_SIZES = (4, 8, 16, 32)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Read a pattern.

    Args:
        pattern: ``"free"`` or ``"n:m"`` with m one of 4, 8, 16, 32 and 0 < n <= m.

    Returns:
        None for ``"free"``, else ``(n, m)``.

    Raises:
        ValueError: if the pattern is neither.
    """
    if pattern == "free":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found:
        raise ValueError(f"pattern {pattern!r} is neither 'free' nor 'n:m'")
    n, m = int(found[1]), int(found[2])
    if m not in GROUP_SIZES or not 0 < n <= m:
        raise ValueError(f"pattern {pattern!r}: m must be one of {GROUP_SIZES} and 0 < n <= m")
    return n, m


def balanced_nonzeros(atoms: int, n: int, m: int) -> int:
    """Number of non-zeros in a column of `atoms` entries under the pattern n:m."""
    return (atoms // m) * n + -(-n * (atoms % m) // m)


def largest_per_column(magnitude: Tensor, nonzeros: int) -> Tensor:
    """Mark exactly the `nonzeros` largest entries of every column.

    Args:
        magnitude: (k, d_out), non-negative.
        nonzeros: how many to keep, 0 < nonzeros <= k.

    Returns:
        bool (k, d_out) with exactly `nonzeros` true entries in every column; ties go to one of the equals.
    """
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    if nonzeros >= magnitude.shape[0]:
        return mask.fill_(True)
    keep = magnitude.topk(nonzeros, dim=0, sorted=False).indices
    return mask.scatter_(0, keep, True)


def largest_balanced(magnitude: Tensor, n: int, m: int) -> Tensor:
    """Mark the n largest entries in every run of m atoms of every column.

    Args:
        magnitude: (k, d_out), non-negative.
        n: entries kept in a run.
        m: length of a run.

    Returns:
        bool (k, d_out).
    """
    k, d_out = magnitude.shape
    whole = k // m * m
    parts = []
    if whole:
        runs = magnitude[:whole].reshape(-1, m, d_out)
        keep = runs.topk(n, dim=1, sorted=False).indices
        mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(1, keep, True)
        parts.append(mask.reshape(whole, d_out))
    if k > whole:
        parts.append(largest_per_column(magnitude[whole:], -(-n * (k - whole) // m)))
    return torch.cat(parts)


def support(codes: Tensor, nonzeros: int, pattern: str = "free") -> Tensor:
    """Support of the projection of `codes` onto the pattern.

    Args:
        codes: (k, d_out).
        nonzeros: non-zeros per column; ignored for ``"n:m"``, where n, m and k fix it.
        pattern: ``"free"`` or ``"n:m"``.

    Returns:
        bool (k, d_out).
    """
    balanced = parse_pattern(pattern)
    if balanced is None:
        return largest_per_column(codes.abs(), nonzeros)
    return largest_balanced(codes.abs(), *balanced)
