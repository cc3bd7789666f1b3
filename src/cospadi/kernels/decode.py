"""From stored tensors to dense rows, a block of rows at a time.

`cospadi.format.unpack` is the definition; the functions here give the same numbers faster. On CPU the mask is expanded
by a table (eight bools a byte at once) and its positions are found by NumPy's `flatnonzero`, some seven times
faster there than `torch.nonzero` or `masked_scatter`, whose branches a random mask defeats (measured, one core). Blocks
of rows keep the scratch in the second-level cache and the memory bounded. Nothing is kept between calls.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed, unpack
from cospadi.format.pack import decode_values, unpack_mask

# Entry b: the bits of the byte b, lowest first, as eight bools seen as one int64 (in memory order on any machine).
_BOOLS = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64).view(-1)


def block(packed: Packed, spec: MatrixSpec, start: int, stop: int) -> tuple[Packed, MatrixSpec]:
    """Rows `start` to `stop` of a stored matrix, as views, with their spec."""
    stop = min(stop, spec.rows)
    return {role: stored[start:stop] for role, stored in packed.items()}, replace(spec, rows=stop - start)


def as_levels(packed: Packed, spec: MatrixSpec) -> tuple[Packed, MatrixSpec] | None:
    """The matrix of levels, where the stored one is that times one scale per row; else None.

    The scale may then multiply the outputs, once per row instead of once per value. Only for bytes, whose levels
    need no unpacking.
    """
    if not (spec.bits == 8 and spec.symmetric and spec.groups == 1):
        return None
    levels = {role: stored for role, stored in packed.items() if role != "scales"}
    return levels, replace(spec, bits=16, group=0)


def dense_rows(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """All rows of a stored matrix as a dense one.

    Args:
        packed: stored tensors (a block's, as a rule).
        spec: how they are stored.
        dtype: of the result.

    Returns:
        (rows, columns) `dtype`, equal to ``unpack(packed, spec, dtype)``.
    """
    values = packed["values"]
    if not spec.sparse:
        return values.to(dtype) if spec.bits == 16 else decode_values(packed, spec, dtype)
    if values.device.type != "cpu" or sys.byteorder != "little":
        return unpack(packed, spec, dtype)
    decoded = values.to(dtype) if spec.bits == 16 else decode_values(packed, spec, dtype)
    mask = packed["mask"].contiguous()
    width = mask.shape[1] * 32
    chosen = torch.index_select(_BOOLS, 0, mask.view(torch.uint8).view(-1).int()).view(torch.bool)
    places = torch.from_numpy(np.flatnonzero(chosen.numpy()))
    dense = torch.zeros(spec.rows * width, dtype=dtype)
    dense.scatter_(0, places, decoded.reshape(-1))
    return dense.view(spec.rows, width)[:, : spec.columns]


def mask_of(packed: Packed, spec: MatrixSpec) -> Tensor:
    """Support as bool (rows, columns); all true for a dense pattern."""
    if spec.sparse:
        return unpack_mask(packed["mask"], spec.columns)
    return torch.ones(spec.rows, spec.columns, dtype=torch.bool, device=packed["values"].device)
