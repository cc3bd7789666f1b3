"""Sparsity patterns: where the non-zeros of a vector may lie, and which entries to keep.

Codes S have shape (k, d_out); a column holds the coefficients of one output. A *pattern* restricts the support of a
column:

* ``"free"``: any atoms;
* ``"n:m"``: exactly n atoms in every run of m consecutive ones. If k is not a multiple of m, the last run has t < m
  atoms and holds ceil(n·t/m) non-zeros.
"""

import re

import torch
from torch import Tensor

GROUP_SIZES = (4, 8, 16, 32)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Parse a pattern.

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


def keep_largest(values: Tensor, nonzeros: int, pattern: str = "free", *, dim: int = 0) -> Tensor:
    """Support of the projection onto a pattern: the entries of largest magnitude that the pattern admits.

    Args:
        values: matrix, any float dtype. (k, d_out) for codes S, (d_out, k) for Sᵀ with ``dim=1``.
        nonzeros: how many entries of each vector to keep; ignored for ``"n:m"``, where n, m and k determine it.
        pattern: ``"free"`` or ``"n:m"``.
        dim: the dimension along which the atoms lie, 0 or 1.

    Returns:
        bool mask of the same shape. Each vector along `dim` has exactly as many true entries as the pattern demands;
        ties are broken arbitrarily.

    Raises:
        ValueError: if the pattern is malformed.
    """
    magnitude, k = values.abs(), values.shape[dim]
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    balanced = parse_pattern(pattern)
    if balanced is None:
        return _mark(mask, magnitude, nonzeros, dim)
    n, m = balanced
    whole = k // m * m
    if whole:
        runs, marks = (torch.unflatten(part.narrow(dim, 0, whole), dim, (-1, m)) for part in (magnitude, mask))
        _mark(marks, runs, n, dim + 1)
    if k > whole:
        rest = k - whole
        _mark(mask.narrow(dim, whole, rest), magnitude.narrow(dim, whole, rest), balanced_nonzeros(rest, n, m), dim)
    return mask


def _mark(mask: Tensor, magnitude: Tensor, count: int, dim: int) -> Tensor:
    """Set the `count` largest entries along `dim` in an all-false mask, in place."""
    if count >= magnitude.shape[dim]:
        return mask.fill_(True)
    return mask.scatter_(dim, magnitude.topk(count, dim=dim, sorted=False).indices, True)
