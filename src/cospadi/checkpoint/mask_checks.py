"""Checks of sparsity masks, scales and signs.

They steer how other tensors are read: a mask with one bit too many would shift every value after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.format.patterns import parse_pattern

_ROWS_AT_ONCE = 1024


def popcounts(words: Tensor) -> dict[int, Tensor]:
    """Count the set bits of int32 words in fields of 4, 8, 16 and 32 bits.

    Args:
        words: int32, any shape.

    Returns:
        by field width m: int32 words of the same shape, whose m-bit fields hold the counts of the same fields.
    """
    # Signed shifts drag the sign bit along; the masks remove it.
    pairs = words - ((words >> 1) & 0x55555555)
    four = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eight = (four + (four >> 4)) & 0x0F0F0F0F
    sixteen = (eight + (eight >> 8)) & 0x00FF00FF
    return {4: four, 8: eight, 16: sixteen, 32: (sixteen + (sixteen >> 16)) & 0xFF}


def _expected_fields(columns: int, n: int, m: int) -> Tensor:
    """The count per m-bit field that the pattern n:m requires, packed into int32 words (words,)."""
    words = []
    for word in range(-(-columns // 32)):
        packed = 0
        for field in range(32 // m):
            here = min(max(columns - word * 32 - field * m, 0), m)
            packed |= -(-n * here // m) << (field * m)
        words.append(packed)
    return torch.tensor(words, dtype=torch.int32)  # a count of at most m leaves the top bit of its field free


def check_codes(packed: Packed, spec: MatrixSpec) -> str | None:
    """Check that a mask marks as many columns as values are stored, and that scales are finite.

    Args:
        packed: tensors by role, of the shapes that the spec says.
        spec: of the matrix.

    Returns:
        None if nothing is wrong, else ``"role: what is wrong"``.
    """
    scales = packed.get("scales")
    if scales is not None and not bool(scales.isfinite().all()):
        return "scales: not all finite"
    return _check_mask(packed["mask"], spec) if spec.sparse else None


def check_rotation(packed: Packed, d_in: int) -> str | None:
    """Check that no sign stands beyond the inputs, and that scales are finite.

    Args:
        packed: tensors of a rotation by role, of the shapes that its spec says.
        d_in: inputs.

    Returns:
        None if nothing is wrong, else ``"role: what is wrong"``.
    """
    scales = packed.get("scales")
    if scales is not None and not bool(scales.isfinite().all()):
        return "scales: not all finite"
    tail = d_in % 32
    if tail and bool(packed["signs"][-1] & (-1 << tail)):
        return f"signs: bits beyond its {d_in} inputs are set"
    return None


def _check_mask(mask: Tensor, spec: MatrixSpec) -> str | None:
    balanced = parse_pattern(spec.pattern)
    tail = spec.columns % 32
    outside = -1 << tail if tail else 0
    expected = torch.zeros(0) if balanced is None else _expected_fields(spec.columns, *balanced).to(mask.device)
    for begin in range(0, spec.rows, _ROWS_AT_ONCE):
        rows = mask[begin : begin + _ROWS_AT_ONCE]
        if outside and bool((rows[:, -1] & outside).any()):
            return f"mask: bits beyond its {spec.columns} atoms are set"
        counts = popcounts(rows)
        total = counts[32].sum(1)
        wrong = total != spec.nonzeros
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            return f"mask: row {begin + row} marks {int(total[row])} values, {spec.nonzeros} are stored"
        if balanced is not None:
            broken = counts[balanced[1]].ne(expected).any(1)
            if bool(broken.any()):
                return f"mask: row {begin + int(broken.nonzero()[0, 0])} breaks the pattern {spec.pattern}"
    return None
