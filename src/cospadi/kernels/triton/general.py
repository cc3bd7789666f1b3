"""The general Triton kernels: sparse rows of any pattern and dense rows of any kind, read as they are stored.

Sparse rows: a tile of the matrix is (ROWS, WORDS, LANES), and each lane owns 32 / LANES adjacent bits of one mask word.
The index of its first value in the row is the number of values before the word plus the number of bits set below the
lane's own bits in the word. With a pattern n:m every full word has the same number of values, so the former is a
product; with ``"free"`` it is a running count over the previous words. Within the lane the index advances by one per
set bit. The lanes of a word read adjacent addresses, so each byte of values is read from memory once.

Integers are widened in registers. A single scale per row multiplies the sum; scales of groups multiply each value.
Faster kernels for common layers are in `balanced` and `walk` (balanced sparse rows) and `integers` (dense integers).
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _parallel_sums(word):
    """Count the set bits of 32-bit words by parallel sums, for the interpreter, which has no device library."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


popcount = _parallel_sums if os.environ.get("TRITON_INTERPRET") == "1" else libdevice.popc


@triton.jit
def half(word, part: tl.constexpr, FLOAT: tl.constexpr):
    """The low (part 0) or high (1) 16-bit float of 32-bit words, as float32."""
    if FLOAT == tl.bfloat16:  # noqa: SIM300 (the upper half of a float32)
        if part == 0:  # noqa: SIM108
            value = (word << 16).to(tl.float32, bitcast=True)
        else:
            value = (word & -65536).to(tl.float32, bitcast=True)
    else:
        value = (word >> (16 * part)).to(tl.int16).to(FLOAT, bitcast=True).to(tl.float32)
    return value


@triton.jit
def zero_points(of_zeros, group, live, BITS: tl.constexpr, HALF: tl.constexpr):
    """Zero points in float32 of the groups `group` of the rows at the pointers `of_zeros`.

    HALF is 0 for integers of BITS bits, 1 for half steps of one bit more, 2 for the middle of all levels, which is not
    stored.
    """
    if HALF == 2:
        zero = (group * 0).to(tl.float32) + ((1 << BITS) - 1) * 0.5
    elif HALF == 1:
        first = group * (BITS + 1)
        word = tl.load(of_zeros + first // 32, mask=live, other=0).to(tl.int64) & 0xFFFFFFFF
        over = first % 32 + BITS + 1 > 32
        following = tl.load(of_zeros + first // 32 + 1, mask=live & over, other=0).to(tl.int64) << 32
        steps = ((word | following) >> (first % 32)) & ((2 << BITS) - 1)
        zero = steps.to(tl.float32) * 0.5
    else:
        PER: tl.constexpr = 32 // BITS
        word = tl.load(of_zeros + group // PER, mask=live, other=0)
        zero = ((word >> ((group % PER) * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    return zero


@triton.jit
def stored_value(rows, index, keep, BITS: tl.constexpr):
    """Value number `index` of the rows at the pointers `rows`; 0 where not `keep`.

    Sub-byte levels of a symmetric spec are stored minus the lowest level, 1 − 2^(BITS−1).
    """
    if BITS == 16 or BITS == 8:
        value = tl.load(rows + index, mask=keep, other=0).to(tl.float32)
    else:
        byte = tl.load(rows + index // (8 // BITS), mask=keep, other=0).to(tl.int32)
        level = (byte >> ((index % (8 // BITS)) * BITS)) & ((1 << BITS) - 1)
        value = tl.where(keep, (level - ((1 << (BITS - 1)) - 1)).to(tl.float32), 0.0)
    return value


@triton.jit
def value_of_bit(of_row, of_scales, own, place, index, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The value in float32 at bit `place` of the words `own`, 0 where the bit is not set; and the bit.

    `index` is the number of values before it in the row.
    """
    one = (own >> place) & 1
    value = stored_value(of_row, index, one != 0, BITS)
    if GROUP > 0:
        value *= tl.load(of_scales + index // GROUP, mask=one != 0, other=0).to(tl.float32)
    return value, one


@triton.jit(do_not_specialize=["rows", "groups", "tokens"])
def sparse_linear_kernel(
    z,
    values,
    mask,
    scales,
    out,
    rows,
    columns,
    stride,
    words,
    groups,
    tokens,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PER_WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Out (tokens, rows) = z (tokens, columns) times the transposed sparse matrix.

    `stride` is that of a row of values, in elements (bytes below 8 bits). PER_WORD is the number of values per full
    mask word, 0 if it varies. TOKENS is 1, or at least 16 for the tensor cores (the rest is padding).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    of_row = values + (safe * stride)[:, None, None]
    word = tl.arange(0, WORDS)
    first = tl.arange(0, LANES) * (32 // LANES)
    below = ((1 << first) - 1)[None, None, :]
    of_scales = scales + (safe * groups)[:, None, None]
    of_mask = mask + (safe * words)[:, None]
    before = tl.zeros([ROWS], dtype=tl.int32)
    token = tl.arange(0, TOKENS)
    if TOKENS == 1:
        sums = tl.zeros([ROWS, WORDS, LANES], dtype=tl.float32)
    else:
        products = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for at in range(0, words, WORDS):
        here = at + word
        bits = tl.load(of_mask + here[None, :], mask=here[None, :] < words, other=0)
        if PER_WORD > 0:
            base = (here * PER_WORD)[None, :, None]
        else:
            counts = popcount(bits)
            base = (before[:, None] + tl.cumsum(counts, 1) - counts)[:, :, None]
            before += tl.sum(counts, 1)
        own = bits[:, :, None]
        index = base + popcount(own & below)
        column = here[:, None] * 32 + first[None, :]
        for bit in tl.static_range(32 // LANES):
            value, one = value_of_bit(of_row, of_scales, own, first[None, None, :] + bit, index, BITS, GROUP)
            if TOKENS == 1:
                inside = column + bit < columns
                weight = tl.load(z + column + bit, mask=inside, other=0).to(tl.float32)
                sums += value * weight[None, :, :]
            else:
                flat = tl.reshape(column, [WORDS * LANES]) + bit
                weight = tl.load(
                    z + token[None, :] * columns + flat[:, None],
                    mask=(flat[:, None] < columns) & (token[None, :] < tokens),
                    other=0,
                )
                tile = tl.reshape(value, [ROWS, WORDS * LANES]).to(weight.dtype)
                products = tl.dot(tile, weight, products)
            index += one
    if TOKENS == 1:
        result = tl.sum(tl.sum(sums, 2), 1)
        if SCALED and GROUP == 0:
            result *= tl.load(scales + safe).to(tl.float32)
        tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)
    else:
        if SCALED and GROUP == 0:
            products *= tl.load(scales + safe).to(tl.float32)[:, None]
        tl.store(
            out + token[None, :].to(tl.int64) * rows + row[:, None],
            products.to(out.dtype.element_ty),
            mask=(row[:, None] < rows) & (token[None, :] < tokens),
        )


@triton.jit(do_not_specialize=["rows", "groups", "zero_stride", "tokens"])
def dense_linear_kernel(
    x,
    values,
    scales,
    zeros,
    out,
    rows,
    columns,
    stride,
    groups,
    zero_stride,
    tokens,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    CENTRED: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out (tokens, rows) = x (tokens, columns) times the transposed dense matrix of 16, 8, 4 or 2 bits.

    A stored element (a 32-bit word, a float or a signed byte) holds PER values; COLUMNS is the number of elements per
    step. For one token the outputs lie in runs of 32, PITCH numbers from run to run, as the balanced kernel reads them.
    The other arguments are those of `sparse_linear_kernel`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    LEVELS: tl.constexpr = (1 << BITS) - 1
    LOW: tl.constexpr = LEVELS // 2 if CENTRED and PER > 1 else 0  # was added to stored symmetric levels
    SHARED: tl.constexpr = GROUP % PER == 0  # values of an element share scale and zero point
    of_values = values + (safe * stride)[:, None]
    of_scales = scales + (safe * groups)[:, None]
    of_zeros = zeros + (safe * zero_stride)[:, None]
    if TOKENS == 1:
        sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    else:
        products = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for at in range(0, tl.cdiv(columns, PER), COLUMNS):
        element = at + tl.arange(0, COLUMNS)
        live = (element * PER < columns)[None, :]
        stored = tl.load(of_values + element[None, :], mask=live, other=0)
        if SHARED:
            group = (element * PER // GROUP if GROUP > 0 else element * 0)[None, :]
            scale = 1.0
            if GROUP > 0:
                scale = tl.load(of_scales + group, mask=live, other=0).to(tl.float32)
            zero = LOW * 1.0
            if not CENTRED:
                zero = zero_points(of_zeros, group, live, BITS, HALF)
        if TOKENS == 1:
            within = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for part in tl.static_range(PER):
            column = element * PER + part
            inside = column < columns
            if not SHARED:
                group = (column // GROUP)[None, :]
                scale = tl.load(of_scales + group, mask=inside[None, :], other=0).to(tl.float32)
                zero = LOW * 1.0
                if not CENTRED:
                    zero = zero_points(of_zeros, group, inside[None, :], BITS, HALF)
            if PER > 1:  # noqa: SIM108
                value = ((stored >> (part * BITS)) & LEVELS).to(tl.float32) - zero
            else:
                value = stored.to(tl.float32)
            if TOKENS == 1:
                weight = tl.load(x + column, mask=inside, other=0).to(tl.float32)[None, :]
                if SHARED:
                    within += value * weight
                else:
                    sums += value * scale * weight
            else:
                if GROUP > 0:
                    value *= scale
                weight = tl.load(
                    x + token[None, :] * columns + column[:, None],
                    mask=inside[:, None] & (token[None, :] < tokens),
                    other=0,
                )
                products = tl.dot(value.to(weight.dtype), weight, products)
        if TOKENS == 1 and SHARED:
            sums += within * scale
    if TOKENS == 1:
        result = tl.sum(sums, 1)
        if SCALED and GROUP == 0:
            result *= tl.load(scales + safe).to(tl.float32)
        tl.store(out + row + (row // 32) * (PITCH - 32), result.to(out.dtype.element_ty), mask=row < rows)
    else:
        if SCALED and GROUP == 0:
            products *= tl.load(scales + safe).to(tl.float32)[:, None]
        tl.store(
            out + token[None, :].to(tl.int64) * rows + row[:, None],
            products.to(out.dtype.element_ty),
            mask=(row[:, None] < rows) & (token[None, :] < tokens),
        )


@triton.jit(do_not_specialize=["rows", "groups"])
def expand_kernel(
    values,
    mask,
    scales,
    out,
    rows,
    columns,
    stride,
    words,
    groups,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PER_WORD: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Out (rows, columns) = the dense form of a sparse matrix, scales applied. Arguments as above."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.arange(0, WORDS)
    # a lane owns four bits, so that it stores four adjacent numbers at once
    first = (tl.arange(0, 8) * 4)[None, None, :]
    below = (1 << first) - 1
    of_mask = mask + (safe * words)[:, None]
    of_row = values + (safe * stride)[:, None, None]
    of_scales = scales + (safe * groups)[:, None, None]
    before = tl.zeros([ROWS], dtype=tl.int32)
    element = out.dtype.element_ty
    factor = 1.0
    if SCALED and GROUP == 0:
        factor = tl.load(scales + safe).to(tl.float32)[:, None, None]
    for at in range(0, words, WORDS):
        here = at + word
        bits = tl.load(of_mask + here[None, :], mask=here[None, :] < words, other=0)
        if PER_WORD > 0:
            base = (here * PER_WORD)[None, :, None]
        else:
            counts = popcount(bits)
            base = (before[:, None] + tl.cumsum(counts, 1) - counts)[:, :, None]
            before += tl.sum(counts, 1)
        own = bits[:, :, None]
        index = base + popcount(own & below)
        value0, one = value_of_bit(of_row, of_scales, own, first, index, BITS, GROUP)
        index += one
        value1, one = value_of_bit(of_row, of_scales, own, first + 1, index, BITS, GROUP)
        index += one
        value2, one = value_of_bit(of_row, of_scales, own, first + 2, index, BITS, GROUP)
        index += one
        value3, one = value_of_bit(of_row, of_scales, own, first + 3, index, BITS, GROUP)
        even = tl.join((value0 * factor).to(element), (value2 * factor).to(element))
        odd = tl.join((value1 * factor).to(element), (value3 * factor).to(element))
        tile = tl.reshape(tl.join(even, odd), [ROWS, WORDS * 32])
        column = at * 32 + tl.arange(0, WORDS * 32)
        tl.store(
            out + (safe * columns)[:, None] + column[None, :],
            tile,
            mask=(column[None, :] < columns) & (row < rows)[:, None],
        )
