"""Triton kernels for dense rows of integers: 8, 4 or 2 bits, with a scale and perhaps a zero point per group.

The cost of such rows is what is done for each value besides the product, so scales multiply sums of the values that
share them. `cospadi.kernels.triton.general` has the kernel for dense rows of any other kind.
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import os

import triton
import triton.language as tl

from cospadi.kernels.triton.general import half, zero_points


@triton.jit
def _byte_by_permutation(word, part: tl.constexpr):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [word, 0x4B000000, 0x7440 + part],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte_by_shift(word, part: tl.constexpr):
    """The same for the interpreter, which has no assembler."""
    return ((word >> (8 * part)) & 0xFF) | 0x4B000000


_byte = _byte_by_shift if os.environ.get("TRITON_INTERPRET") == "1" else _byte_by_permutation


@triton.jit
def _level(word, part: tl.constexpr, BITS: tl.constexpr):
    """2^23 plus level number `part` of 32-bit words, as float32: the level occupies the low bits of the mantissa."""
    if BITS == 8:  # noqa: SIM108
        found = _byte(word, part)
    else:
        found = ((word >> (BITS * part)) & ((1 << BITS) - 1)) | 0x4B000000
    return found.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "groups", "zero_stride"])
def one_token_kernel(
    x,
    values,
    scales,
    zeros,
    out,
    rows,
    columns,
    groups,
    zero_stride,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRED: tl.constexpr,
    HALF: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Out (rows) = x (columns) times the transposed matrix.

    A thread takes chunks of 16 bytes, 128 / BITS values. Rows and groups are whole numbers of chunks. `values` points
    to 32-bit words, x to 64-bit ones of four 16-bit floats. The outputs lie in runs of 32, PITCH numbers from run to
    run.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    PER: tl.constexpr = 32 // BITS
    EACH: tl.constexpr = 4 * PER
    FOURS: tl.constexpr = PER // 4  # 64-bit words of x to a word of values
    # symmetric bytes are signed; smaller levels are stored minus the lowest
    LEAST: tl.constexpr = 128 if BITS == 8 else (1 << (BITS - 1)) - 1
    chunk = tl.arange(0, CHUNKS)
    four = tl.arange(0, 4)[None, None, :]
    chunks = columns // EACH
    of_values = values + (safe * chunks * 4)[:, None, None]
    of_scales = scales + (safe * groups)[:, None]
    of_zeros = zeros + (safe * zero_stride)[:, None]
    sums = tl.zeros([ROWS, CHUNKS], dtype=tl.float32)
    ahead = tl.load(of_values + (chunk * 4)[None, :, None] + four, mask=(chunk < chunks)[None, :, None], other=0)
    for at in range(0, chunks, CHUNKS):
        here = at + chunk
        live = (here < chunks)[None, :]
        word = ahead
        later = here + CHUNKS
        ahead = tl.load(of_values + (later * 4)[None, :, None] + four, mask=(later < chunks)[None, :, None], other=0)
        offset = 8388608.0 + LEAST
        scale = 1.0
        if GROUP > 0:
            scale = tl.load(of_scales + (here * EACH // GROUP)[None, :], mask=live, other=0).to(tl.float32)
        if not CENTRED:
            group = here * EACH // GROUP if GROUP > 0 else here * 0
            offset = zero_points(of_zeros, group[None, :], live, BITS, HALF)[:, :, None]
            if HALF == 0:
                offset += 8388608.0
        elif BITS == 8:
            word = word ^ -2139062144  # 0x80808080: signed to unsigned
        within = tl.zeros([ROWS, CHUNKS, 4], dtype=tl.float32)
        for quarter in tl.static_range(FOURS):
            # every row loads x again from the L1 cache: sharing it between threads would need barriers
            of_x = tl.broadcast_to(x + (here[None, :, None] * 4 + four) * FOURS + quarter, [ROWS, CHUNKS, 4])
            weights = tl.load(of_x, mask=live[:, :, None], other=0)
            for part in tl.static_range(4):
                weight = half((weights >> (32 * (part // 2))).to(tl.int32), part % 2, FLOAT)
                level = _level(word, quarter * 4 + part, BITS)
                if HALF > 0:  # 2^23 and a half has no float32
                    level -= 8388608.0
                within += (level - offset) * weight
        sums += tl.sum(within, 2) * scale
    result = tl.sum(sums, 1)
    if GROUP == 0:
        result *= tl.load(scales + safe).to(tl.float32)
    tl.store(out + row + (row // 32) * (PITCH - 32), result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "groups", "zero_stride", "tokens"])
def few_tokens_kernel(
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
    GROUP: tl.constexpr,
    CENTRED: tl.constexpr,
    HALF: tl.constexpr,
    SIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Out (tokens, rows) = x (tokens, columns) times the transposed matrix, on the tensor cores.

    Spans of SPAN columns, a power of two that divides GROUP, are multiplied side by side, SPANS at a time, as exact
    levels in the dtype of x; the result of each is scaled in float32. `values` points to bytes, SIGNED or not, with
    `stride` bytes per row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)[None, :]
    PER: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    LEAST: tl.constexpr = (LEVELS - 1) // 2 if CENTRED and not SIGNED else 0
    span = tl.arange(0, SPANS)
    token = tl.arange(0, TOKENS)[None, None, :]
    column = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    sums = tl.zeros([SPANS, ROWS, TOKENS], dtype=tl.float32)
    for at in range(0, columns, SPANS * SPAN):
        here = at + column
        live = here < columns
        stored = tl.load(
            values + (safe * stride)[:, :, None] + (here // PER)[:, None, :], mask=live[:, None, :], other=0
        )
        if BITS < 8:
            stored = ((stored.to(tl.int32) >> ((here % PER) * BITS)[:, None, :]) & LEVELS) - LEAST
        weight = tl.load(x + token * columns + here[:, :, None], mask=live[:, :, None] & (token < tokens), other=0)
        part = tl.dot(stored.to(weight.dtype), weight)
        inside = (at + span * SPAN < columns)[:, None]
        if not CENTRED:
            group = (at + span * SPAN) // GROUP if GROUP > 0 else span * 0
            zero = zero_points(zeros + safe * zero_stride, group[:, None], inside, BITS, HALF)
            part -= zero[:, :, None] * tl.sum(weight.to(tl.float32), 1)[:, None, :]
        if GROUP > 0:
            group = (at + span * SPAN) // GROUP
            scale = tl.load(scales + safe * groups + group[:, None], mask=inside, other=0).to(tl.float32)
            sums += part * scale[:, :, None]
        else:
            sums += part
    result = tl.sum(sums, 0)
    of_row = tl.minimum(row, rows - 1)
    if GROUP == 0:
        result *= tl.load(scales + of_row).to(tl.float32)[:, None]
    column_of_out = tl.arange(0, TOKENS)[None, :]
    tl.store(
        out + column_of_out.to(tl.int64) * rows + row[:, None],
        result.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (column_of_out < tokens),
    )


@triton.jit(do_not_specialize=["rows", "groups", "zero_stride"])
def expand_integers_kernel(
    values,
    scales,
    zeros,
    out,
    rows,
    columns,
    stride,
    groups,
    zero_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRED: tl.constexpr,
    HALF: tl.constexpr,
    PER: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Out (rows, columns) = the dense form of the matrix, scales applied.

    An element of `values`, a signed byte or a 32-bit word, holds PER values. The columns of a run of RUN share scale,
    zero point and, unless PER is 1, the word.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)[:, None, None]
    run = (tl.program_id(1) * RUNS + tl.arange(0, RUNS))[None, :, None]
    step = tl.arange(0, RUN)[None, None, :]
    first = run * RUN
    column = first + step
    inside = first < columns
    LEVELS: tl.constexpr = (1 << BITS) - 1
    if PER == 1:
        level = tl.load(values + safe * stride + column, mask=column < columns, other=0).to(tl.int32)
    else:
        word = tl.load(values + safe * stride + first // PER, mask=inside, other=0)
        level = (word >> ((column % PER) * BITS)) & LEVELS
        if CENTRED:
            level -= (LEVELS - 1) // 2
    group = first // GROUP if GROUP > 0 else first * 0
    value = level.to(tl.float32)
    if not CENTRED:
        value -= zero_points(zeros + safe * zero_stride, group, inside, BITS, HALF)
    scale = tl.load(scales + safe * groups + group, mask=inside, other=0).to(tl.float32)
    tl.store(
        out + safe * columns + column,
        (value * scale).to(out.dtype.element_ty),
        mask=(column < columns) & (row < rows)[:, None, None],
    )
