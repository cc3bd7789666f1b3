"""Packing: from float matrices to the stored tensors and back.

Bit order: stored value i of a row occupies bits [i·b, (i+1)·b) of the row's little-endian bit stream, which is cut into
32-bit words. Mask bit c of a row is bit c % 32 of word c // 32. The values of a sparse row are stored in ascending
column order. The symbols of a trellis tile are one row.
"""

import torch
from torch import Tensor

from cospadi.format.patterns import keep_largest
from cospadi.format.schema import MatrixSpec, Stored
from cospadi.format.trellis import Trellis, decode_matrix

Packed = dict[str, Tensor]


def pack_bits(levels: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers of `bits` bits.

    Args:
        levels: integer (rows, n), 0 <= level < 2**bits.
        bits: 1 to 16.

    Returns:
        int32 (rows, ceil(n·bits/32)).
    """
    rows, n = levels.shape
    words = -(-n * bits // 32)
    if 32 % bits == 0:  # no value straddles two words
        per = 32 // bits
        padded = torch.zeros(rows, words * per, dtype=torch.int64, device=levels.device)
        padded[:, :n] = levels
        shifts = torch.arange(per, device=levels.device) * bits
        packed = (padded.view(rows, words, per) << shifts).sum(-1)
    else:
        packed = torch.zeros(rows, words + 1, dtype=torch.int64, device=levels.device)
        start = torch.arange(n, device=levels.device) * bits
        shifted = levels.to(torch.int64) << (start % 32)
        word = (start // 32).expand(rows, n)
        packed.scatter_add_(1, word, shifted & 0xFFFFFFFF)
        packed.scatter_add_(1, word + 1, shifted >> 32)
        packed = packed[:, :words]
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        words: int32 (rows, ceil(count·bits/32)).
        bits: 1 to 16.
        count: values per row.

    Returns:
        int32 (rows, count).
    """
    if 32 % bits == 0:
        per = 32 // bits
        shifts = torch.arange(per, device=words.device, dtype=torch.int32) * bits
        levels = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return levels.reshape(words.shape[0], -1)[:, :count].contiguous()
    wide = torch.cat([words.to(torch.int64) & 0xFFFFFFFF, torch.zeros_like(words[:, :1], dtype=torch.int64)], 1)
    start = torch.arange(count, device=words.device) * bits
    both = wide[:, start // 32] | (wide[:, start // 32 + 1] << 32)
    return ((both >> (start % 32)) & ((1 << bits) - 1)).to(torch.int32)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask (rows, columns) into int32 words (rows, ceil(columns/32))."""
    return pack_bits(mask.to(torch.uint8), 1)


def unpack_mask(words: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_mask`."""
    return unpack_bits(words, 1, columns).to(torch.bool)


def spread(per_group: Tensor, spec: MatrixSpec) -> Tensor:
    """Expand one number per group (rows, groups) to one per stored value (rows, nonzeros)."""
    size = spec.group or spec.nonzeros
    return per_group.repeat_interleave(size, dim=1)[:, : spec.nonzeros]


def _encode(values: Tensor, spec: MatrixSpec, stored: Stored, dtype: torch.dtype) -> Packed:
    if spec.bits == 16:
        return {"values": values.to(dtype)}
    if spec.bits == 14:
        pattern = values.to(torch.bfloat16).view(torch.int16).to(torch.int32)
        rounded = (pattern + 2) >> 2  # to nearest; a carry into the exponent is correct
        return {"values": pack_bits(rounded & 0x3FFF, 14)}
    if stored.scales is None:
        raise ValueError(f"{spec.bits}-bit values need scales")
    scales = spread(stored.scales.float(), spec)
    low, high = integer_range(spec.bits, spec.symmetric, spec.half)
    levels = torch.where(scales != 0, values.float() / scales, 0.0)
    packed: Packed = {"scales": stored.scales.to(dtype)}
    if spec.centred:
        levels = levels.round().clamp(low, high)
        packed["values"] = levels.to(torch.int8) if spec.bits == 8 else pack_bits((levels - low).int(), spec.bits)
        return packed
    if spec.symmetric:
        levels = (levels + high / 2).round()
    else:
        if stored.zeros is None:
            raise ValueError("asymmetric values need zero points")
        zeros = stored.zeros.float()
        wide = spread(zeros, spec)
        levels = (levels + wide).round() if spec.half else levels.round() + wide
        packed["zeros"] = pack_bits((zeros * 2 if spec.half else zeros).int(), spec.zero_bits)
    packed["values"] = pack_bits(levels.clamp(low, high).int(), spec.bits)
    return packed


def integer_range(bits: int, symmetric: bool, half: bool = False) -> tuple[int, int]:
    """Smallest and largest level: ±(2^(b−1) − 1) around zero, or 0 … 2^b − 1 with a zero point or in half steps."""
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric and not half else (0, 2**bits - 1)


def zero_points(packed: Packed, spec: MatrixSpec) -> Tensor:
    """Zero points of an integer matrix (rows, groups): int32, or float32 multiples of ½ in half steps."""
    if not spec.half:
        return unpack_bits(packed["zeros"], spec.bits, spec.groups)
    if spec.symmetric:
        middle = (2**spec.bits - 1) / 2
        return torch.full((spec.rows, spec.groups), middle, device=packed["values"].device)
    return unpack_bits(packed["zeros"], spec.zero_bits, spec.groups) / 2


def decode_values(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """Stored values as floats (rows, nonzeros), in column order."""
    if spec.trellis is not None:
        shape = (spec.rows, spec.columns)
        return decode_matrix(packed["values"], packed["scales"], *shape, spec.bits, spec.trellis, dtype)
    if spec.bits == 16:
        return packed["values"].to(dtype)
    if spec.bits == 14:
        pattern = unpack_bits(packed["values"], 14, spec.nonzeros) << 2
        pattern = torch.where(pattern >= 2**15, pattern - 2**16, pattern)
        return pattern.to(torch.int16).view(torch.bfloat16).to(dtype)
    levels = packed["values"] if spec.signed_bytes else unpack_bits(packed["values"], spec.bits, spec.nonzeros)
    if spec.half:  # levels in half steps may need more digits than 16-bit floats have
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = (levels - spread(zero_points(packed, spec), spec)).to(wide) * spread(packed["scales"].to(wide), spec)
        return values.to(dtype)
    if spec.symmetric:
        low = 0 if spec.bits == 8 else integer_range(spec.bits, spec.symmetric)[0]
        shifted = levels.to(dtype) + low
    else:
        shifted = (levels - spread(zero_points(packed, spec), spec)).to(dtype)
    return shifted * spread(packed["scales"].to(dtype), spec)


def pack(stored: Stored, spec: MatrixSpec, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """Pack a matrix into its stored tensors.

    Args:
        stored: the matrix (rows, columns), with scales if the spec asks for integers.
        spec: how to store it.
        dtype: the model's 16-bit float type, used for values and scales.

    Returns:
        tensors by role (values, mask, scales, zeros) with the shapes and dtypes of `spec.tensors(dtype)`.

    Raises:
        ValueError: if the shape differs from the spec's, the rows do not have the number of non-zeros that the spec
            demands, or scales or zero points are missing.
    """
    matrix = stored.matrix
    if spec.trellis is not None:
        return _pack_symbols(matrix, stored.scales, spec, spec.trellis, dtype)
    if tuple(matrix.shape) != (spec.rows, spec.columns):
        raise ValueError(f"matrix is {tuple(matrix.shape)}, the spec says {(spec.rows, spec.columns)}")
    if not spec.sparse:
        return _encode(matrix, spec, stored, dtype)
    mask = stored.support
    if mask is None:
        mask = keep_largest(matrix, spec.nonzeros, spec.pattern, dim=1)
    if bool((mask.sum(1) != spec.nonzeros).any()) or bool((matrix[~mask] != 0).any()):
        raise ValueError(f"the matrix does not have {spec.nonzeros} non-zeros in every row under {spec.pattern}")
    packed = _encode(matrix[mask].view(spec.rows, spec.nonzeros), spec, stored, dtype)
    return packed | {"mask": pack_mask(mask)}


def _pack_symbols(
    symbols: Tensor, scales: Tensor | None, spec: MatrixSpec, trellis: Trellis, dtype: torch.dtype
) -> Packed:
    shape = (*trellis.tiles(spec.rows, spec.columns), trellis.values)
    if tuple(symbols.shape) != shape or symbols.dtype != torch.uint8:
        raise ValueError(f"symbols are {symbols.dtype} {list(symbols.shape)}, the spec says torch.uint8 {list(shape)}")
    if scales is None or tuple(scales.shape) != (spec.rows, 1):
        raise ValueError(f"trellis codes of {spec.rows} rows need scales of shape {[spec.rows, 1]}")
    if bool((symbols >> spec.bits).any()):
        raise ValueError(f"a symbol is larger than {spec.bits} bits hold")
    rows = [pack_bits(row, spec.bits) for row in symbols]  # bounds the memory: bits are packed as 64-bit integers
    return {"scales": scales.to(dtype), "values": torch.stack(rows)}


def unpack_symbols(packed: Packed, spec: MatrixSpec) -> Tensor:
    """Symbols of a trellis as `Stored` holds them: uint8 (tiles along rows, tiles along columns, values of a tile).

    Raises:
        ValueError: if the spec has no trellis.
    """
    if spec.trellis is None:
        raise ValueError("the matrix has no trellis, hence no symbols")
    count = spec.trellis.values
    return torch.stack([unpack_bits(row, spec.bits, count).to(torch.uint8) for row in packed["values"]])


def unpack(packed: Packed, spec: MatrixSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reconstruct the matrix (rows, columns) from its stored tensors, in `dtype`."""
    values = decode_values(packed, spec, dtype)
    if not spec.sparse:
        return values
    matrix = torch.zeros(spec.rows, spec.columns, dtype=dtype, device=values.device)
    mask = unpack_mask(packed["mask"], spec.columns)
    return matrix.masked_scatter(mask, values)
