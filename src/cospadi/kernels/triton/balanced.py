"""The Triton kernel for balanced sparse rows, in which every mask word has the same number of values.

The values of a word then begin at a 64- or 32-bit boundary (a *unit*). A thread takes whole words and walks over their
set bits, so the work is proportional to the number of values, not of bits. Other sparse rows are multiplied by the
kernels of `cospadi.kernels.triton.general`.
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from cospadi.kernels.triton.general import popcount


@triton.jit
def unpacked(word, part: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Value number `part` of units of packed values, as float32."""
    if BITS == 16:
        value = (word >> (16 * part)).to(tl.int16).to(FLOAT, bitcast=True).to(tl.float32)
    elif BITS == 8:
        value = (word >> (8 * part)).to(tl.int8).to(tl.float32)
    else:
        level = (word >> (BITS * part)).to(tl.int32) & ((1 << BITS) - 1)
        value = (level - ((1 << (BITS - 1)) - 1)).to(tl.float32)
    return value


@triton.jit
def walked(
    packed,
    bits,
    window,
    scale,
    plane,
    sums,
    more,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """Multiply the EACH values of units by z at the lowest set bits; returns the remaining bits, and the sums."""
    token = tl.arange(0, TOKENS)[None, None, :]
    for part in tl.static_range(EACH):
        # of the lowest set bit b: bits ^ (bits - 1) has b + 1 ones; counting trailing zeros would add a branch for 0
        rest = bits - 1
        place = popcount(bits ^ rest)
        bits = bits & rest
        value = unpacked(packed, part, BITS, FLOAT)
        if GROUP > 0:
            value *= scale
        at_place = window + ((place * TOKENS)[:, :, None] + token)
        sums += value[:, :, None] * tl.load(at_place).to(tl.float32)
        if PLANES > 1:
            more += value[:, :, None] * tl.load(at_place + plane * TOKENS).to(tl.float32)
    return bits, sums, more


@triton.jit(do_not_specialize=["rows", "words", "groups", "tokens", "plane"])
def balanced_linear_kernel(
    z,
    values,
    mask,
    scales,
    out,
    rows,
    words,
    groups,
    tokens,
    plane,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    FLOAT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PER_WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Out (tokens, rows) = z (tokens, columns) times the transposed matrix; a mask word has PER_WORD values.

    A thread owns whole words. It loads their values one or two units of UNIT bits at a time, takes the set bits of the
    mask one after the other, and gathers z from the L1 cache, all tokens of a column at once. `values` points to units,
    z to (PLANES, words, PITCH, TOKENS): PLANES is 1 or 2, `plane` the number of columns of a plane, and TOKENS a power
    of two, at most the 16 bytes that a thread loads at once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.arange(0, WORDS)
    CHUNKS: tl.constexpr = PER_WORD * BITS // UNIT
    EACH: tl.constexpr = UNIT // BITS
    WIDE: tl.constexpr = 1 if CHUNKS % 2 else 2  # units of a load
    STEPS: tl.constexpr = CHUNKS // WIDE
    lane = tl.arange(0, WIDE)[None, None, :]
    # packed zeros, for words beyond the end of the row
    ALL: tl.constexpr = (1 << (UNIT - 1)) - 1
    ZERO: tl.constexpr = 0x7777777777777777 & ALL if BITS == 4 else (0x5555555555555555 & ALL if BITS == 2 else 0)
    of_mask = mask + (safe * words)[:, None]
    of_values = values + (safe * words * CHUNKS)[:, None, None]
    of_scales = scales + (safe * groups)[:, None]
    sums = tl.zeros([ROWS, WORDS, TOKENS], dtype=tl.float32)
    more = tl.zeros([ROWS, WORDS, TOKENS], dtype=tl.float32)
    scale = tl.full([ROWS, WORDS], 1.0, tl.float32)
    # Loads complete in order, so the next values and mask words are loaded before the present ones are used.
    near = tl.minimum(word, words - 1)[None, :]
    ahead = tl.load(
        of_values + (near * STEPS)[:, :, None] * WIDE + lane, mask=(word < words)[None, :, None], other=ZERO
    )
    ahead_bits = tl.load(of_mask + near)
    for at in range(0, words, WORDS):
        near = tl.minimum(at + word, words - 1)[None, :]
        inside = (at + word < words)[None, :, None]
        window = z + ((near * PITCH - 1) * TOKENS)[:, :, None]
        bits = ahead_bits
        for step in tl.static_range(STEPS):
            packed = ahead
            if step + 1 < STEPS:
                ahead = tl.load(
                    of_values + (near * STEPS + (step + 1))[:, :, None] * WIDE + lane, mask=inside, other=ZERO
                )
            else:
                later = at + WORDS + word
                beyond = tl.minimum(later, words - 1)[None, :]
                ahead = tl.load(
                    of_values + (beyond * STEPS)[:, :, None] * WIDE + lane,
                    mask=(later < words)[None, :, None],
                    other=ZERO,
                )
                ahead_bits = tl.load(of_mask + beyond)
            first = near * PER_WORD + step * WIDE * EACH
            if GROUP > 0:  # a group never ends within a unit
                scale = tl.load(of_scales + first // GROUP).to(tl.float32)
            if WIDE == 1:
                low = tl.reshape(packed, [ROWS, WORDS])
                bits, sums, more = walked(
                    low, bits, window, scale, plane, sums, more, BITS, FLOAT, GROUP, TOKENS, PLANES, EACH
                )
            else:
                low, high = tl.split(packed)
                bits, sums, more = walked(
                    low, bits, window, scale, plane, sums, more, BITS, FLOAT, GROUP, TOKENS, PLANES, EACH
                )
                if GROUP > 0:
                    scale = tl.load(of_scales + (first + EACH) // GROUP).to(tl.float32)
                bits, sums, more = walked(
                    high, bits, window, scale, plane, sums, more, BITS, FLOAT, GROUP, TOKENS, PLANES, EACH
                )
    factor = 1.0
    if SCALED and GROUP == 0:
        factor = tl.load(scales + safe).to(tl.float32)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    to = out + token.to(tl.int64) * rows + row[:, None]
    element = out.dtype.element_ty
    kept = (row < rows)[:, None]
    tl.store(to, (tl.sum(sums, 1) * factor).to(element), mask=kept & (token < tokens))
    if PLANES > 1:
        rest = tl.sum(more, 1) * factor
        tl.store(to + TOKENS * rows.to(tl.int64), rest.to(element), mask=kept & (token + TOKENS < tokens))
