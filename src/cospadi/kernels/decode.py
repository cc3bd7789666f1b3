"""Unpacking stored tensors into dense rows, one block of rows at a time.

`cospadi.format.unpack` is the definition; the functions here compute the same numbers faster. On CPU a table expands
the mask, eight bools per byte. NumPy's `flatnonzero` finds their positions, about seven times faster than
`torch.nonzero` or `masked_scatter`, whose branches mispredict on a random mask, and NumPy writes the values, twice as
fast as `scatter_` (measured on one core). The two or four values in a byte also come from a table, as floats. Blocks of
rows keep the scratch memory bounded and within the L2 cache. Nothing is kept between calls.
"""

import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed, unpack
from cospadi.format.pack import decode_values, integer_range, unpack_bits, unpack_mask

# Entry b: the bits of the byte b, lowest first, as eight bools viewed as one int64 (in memory order on any machine).
_BOOLS = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64).view(-1)

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def block(packed: Packed, spec: MatrixSpec, start: int, stop: int) -> tuple[Packed, MatrixSpec]:
    """Rows `start` to `stop` of a stored matrix, as views, with their spec.

    With a trellis, `start` must be the first row of a tile.
    """
    stop = min(stop, spec.rows)
    part = {role: stored[start:stop] for role, stored in packed.items()}
    if spec.trellis is not None:
        tall = spec.trellis.outputs
        part["values"] = packed["values"][start // tall : -(-stop // tall)]
    return part, replace(spec, rows=stop - start)


def as_levels(packed: Packed, spec: MatrixSpec) -> tuple[Packed, MatrixSpec] | None:
    """The matrix of levels, if the stored matrix is those levels times one scale per row; otherwise None.

    The scale can then multiply the outputs, once per row instead of once per value. Only for 8-bit values, whose levels
    need no unpacking.
    """
    if not (spec.signed_bytes and spec.groups == 1):
        return None
    levels = {role: stored for role, stored in packed.items() if role != "scales"}
    return levels, replace(spec, bits=16, group=0)


def dense_rows(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """All rows of a stored matrix as a dense matrix.

    Args:
        packed: stored tensors, usually of one block.
        spec: how they are stored.
        dtype: of the result.

    Returns:
        (rows, columns) `dtype`, equal to ``unpack(packed, spec, dtype)``.
    """
    if packed["values"].device.type != "cpu" or sys.byteorder != "little":
        return unpack(packed, spec, dtype)
    decoded = _values(packed, spec, dtype)
    if not spec.sparse:
        return decoded
    mask = packed["mask"].contiguous()
    width = mask.shape[1] * 32
    chosen = torch.index_select(_BOOLS, 0, mask.view(torch.uint8).view(-1).int()).view(torch.bool)
    dense = torch.zeros(spec.rows * width, dtype=dtype)
    whole = _WHOLE[dtype.itemsize]  # NumPy has no bfloat16, so numbers are moved as integers of the same size
    dense.view(whole).numpy()[np.flatnonzero(chosen.numpy())] = decoded.reshape(-1).view(whole).numpy()
    return dense.view(spec.rows, width)[:, : spec.columns]


def _values(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """Stored values as floats (rows, nonzeros), equal to those of `cospadi.format.pack.decode_values`."""
    values = packed["values"].detach()
    if spec.bits == 16:
        return values.to(dtype)
    if not spec.integer or not spec.centred or spec.trellis is not None:
        return decode_values(packed, spec, dtype)
    if spec.bits == 8:
        levels = values.to(dtype)
    elif 8 % spec.bits == 0 and 8 // spec.bits * dtype.itemsize <= 8:
        table, per_byte = _level_table(spec.bits, dtype)
        found = torch.index_select(table, 0, values.contiguous().view(torch.uint8).view(-1).int())
        levels = found.view(dtype).view(spec.rows, values.shape[1] * 4 * per_byte)[:, : spec.nonzeros]
    else:
        levels = unpack_bits(values, spec.bits, spec.nonzeros).to(dtype) + integer_range(spec.bits, spec.symmetric)[0]
    return _scaled(levels, packed["scales"].detach().to(dtype), spec)


def _scaled(levels: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
    """Levels (rows, nonzeros) times the scales (rows, groups) of their groups, in place."""
    size = spec.group or spec.nonzeros
    whole = spec.nonzeros // size
    levels[:, : whole * size].view(spec.rows, whole, size).mul_(scales[:, :whole, None])
    if whole < spec.groups:
        levels[:, whole * size :].mul_(scales[:, whole:])
    return levels


@lru_cache
def _level_table(bits: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Entry b: the symmetric levels in the byte b, lowest first, as floats viewed as one integer; and their number."""
    per_byte = 8 // bits
    levels = (torch.arange(256).unsqueeze(1) >> (torch.arange(per_byte) * bits)) & ((1 << bits) - 1)
    floats = (levels - (2 ** (bits - 1) - 1)).to(dtype)
    return floats.view(_WHOLE[per_byte * dtype.itemsize]).view(-1), per_byte


def mask_of(packed: Packed, spec: MatrixSpec) -> Tensor:
    """The support as bool (rows, columns); all True for a dense pattern."""
    if spec.sparse:
        return unpack_mask(packed["mask"], spec.columns)
    return torch.ones(spec.rows, spec.columns, dtype=torch.bool, device=packed["values"].device)
