"""Triton kernels for trellis codes (docs/format.md): a product for a few tokens, and the dense form for many.

A value is a hash of a window of its tile's bit stream, so values are decoded in any order and nothing but the stream is
read. Four values that follow each other lie in 32 bits, which two words hold: one funnel shift serves all four.
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

RUN = tl.constexpr(4)
"""Values that are decoded from one shift: 3 · 4 + 16 bits are less than 32."""


@triton.jit
def _level(state):
    """The sum of the four bytes of the hash of states (int32), less 510, as float32."""
    found = state * -2082680531  # 0x83DCD12D
    pairs = (found & 0x00FF00FF) + ((found >> 8) & 0x00FF00FF)
    # 2^23 plus a small integer: the integer occupies the low bits of the mantissa
    total = ((pairs & 0xFFFF) + (pairs >> 16)) | 0x4B000000
    return total.to(tl.float32, bitcast=True) - 8389118.0


@triton.jit
def _windows(of_tile, bit, live, WORDS: tl.constexpr):
    """32 bits of circular streams of WORDS words from a bit position on, as int32."""
    word = bit // 32
    low = tl.load(of_tile + word, mask=live, other=0).to(tl.uint32).to(tl.uint64)
    high = tl.load(of_tile + (word + 1) % WORDS, mask=live, other=0).to(tl.uint32).to(tl.uint64)
    return ((low | (high << 32)) >> (bit % 32).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "tiles", "each", "tokens"])
def few_tokens_kernel(
    x,
    values,
    out,
    rows,
    columns,
    tiles,
    each,
    tokens,
    BITS: tl.constexpr,
    STATE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Out (parts, tokens, rows) float32 = x (tokens, columns) times the transposed levels, a part for each share of x.

    A program takes one row of tiles, and of its `tiles` tiles the `each` of its part, TILES at a time.
    """
    WORDS: tl.constexpr = INPUTS * OUTPUTS * BITS // 32
    of_row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    inside = tl.arange(0, OUTPUTS)[None, :]
    number = tl.arange(0, TILES)[:, None]
    token = tl.arange(0, TOKENS)[:, None, None]
    sums = tl.zeros([TOKENS, TILES, OUTPUTS], dtype=tl.float32)
    last = tl.minimum((part + 1) * each, tiles)
    for at in range(part * each, last, TILES):
        tile = at + number
        live = tile < last
        of_tile = values + (of_row * tiles + tile) * WORDS
        for first in tl.static_range(0, INPUTS, RUN):
            window = _windows(of_tile, (inside * INPUTS + first) * BITS, live, WORDS)
            for step in tl.static_range(RUN):
                level = _level((window >> (BITS * step)) & ((1 << STATE) - 1))
                column = tile * INPUTS + first + step
                known = live & (column < columns)
                weight = tl.load(
                    x + token * columns + column[None, :, :], mask=known[None, :, :] & (token < tokens), other=0
                )
                sums += level[None, :, :] * weight.to(tl.float32)
    row = of_row * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    token = tl.arange(0, TOKENS)[:, None]
    place = (part * tokens + token).to(tl.int64) * rows + row
    tl.store(out + place, tl.sum(sums, 1), mask=(row < rows) & (token < tokens))


@triton.jit(do_not_specialize=["rows", "tokens", "parts"])
def add_parts_kernel(parts_of, scales, out, rows, tokens, parts, ROWS: tl.constexpr):
    """Out (tokens, rows) = the sum of the parts, times the scale of each row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    live = row < rows
    total = tl.zeros([ROWS], dtype=tl.float32)
    for part in range(parts):
        total += tl.load(parts_of + (part * tokens + token).to(tl.int64) * rows + row, mask=live, other=0)
    scale = tl.load(scales + row, mask=live, other=0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * rows + row, (total * scale).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "tiles"])
def expand_kernel(
    values,
    scales,
    out,
    rows,
    columns,
    tiles,
    BITS: tl.constexpr,
    STATE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out (rows, columns) = the dense form of the matrix, scales applied."""
    WORDS: tl.constexpr = INPUTS * OUTPUTS * BITS // 32
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    live = (row < rows) & (column < columns)
    of_tile = values + ((row // OUTPUTS).to(tl.int64) * tiles + column // INPUTS) * WORDS
    bit = ((row % OUTPUTS) * INPUTS + column % INPUTS) * BITS
    level = _level(_windows(of_tile, bit, live, WORDS) & ((1 << STATE) - 1))
    scale = tl.load(scales + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * columns + column, (level * scale).to(out.dtype.element_ty), mask=live)
