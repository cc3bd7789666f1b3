"""A leaner Triton kernel for balanced sparse rows and one token.

It computes what `cospadi.kernels.triton.balanced` does with fewer instructions per value, which are the limit where
values are small:

* set bits are taken from the highest down: finding and clearing one takes three instructions instead of four;
* a scale multiplies the sum of the values that share it within a word, not every value.
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import os

import triton
import triton.language as tl

from cospadi.kernels.triton.general import half


@triton.jit
def _bfind(word):
    return tl.inline_asm_elementwise(
        "bfind.u32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
    )  # no branch for 0, unlike a count of leading zeros


@triton.jit
def _bisected(word):
    """The same by bisection, for the interpreter, which has no assembler."""
    rest = word.to(tl.uint32, bitcast=True)
    place = tl.zeros_like(word)
    for step in tl.static_range(5):
        above = rest >= (1 << (16 >> step))
        place += tl.where(above, 16 >> step, 0)
        rest = tl.where(above, rest >> (16 >> step), rest)
    return place


highest = _bisected if os.environ.get("TRITON_INTERPRET") == "1" else _bfind


@triton.jit
def _number(unit, part: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Value number `part` of 32-bit units of packed values, as float32."""
    if BITS == 16:
        value = half(unit, part, FLOAT)
    elif BITS == 8:
        value = (unit >> (8 * part)).to(tl.int8).to(tl.float32)
    else:
        value = (((unit >> (BITS * part)) & ((1 << BITS) - 1)) - ((1 << (BITS - 1)) - 1)).to(tl.float32)
    return value


@triton.jit
def _walked(unit, bits, window, sums, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Multiply the values of units, last to first, by z at the highest set bits; returns the rest of the bits, sums."""
    EACH: tl.constexpr = 32 // BITS
    for back in tl.static_range(EACH):
        place = highest(bits)
        bits = bits ^ (1 << place)
        sums += _number(unit, EACH - 1 - back, BITS, FLOAT) * tl.load(window + place)
    return bits, sums


@triton.jit(do_not_specialize=["rows", "words", "groups"])
def walk_linear_kernel(
    z,
    values,
    mask,
    scales,
    out,
    rows,
    words,
    groups,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PER_WORD: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Out (rows) = z (words, PITCH) float32 times the transposed matrix; a mask word has PER_WORD values.

    `values` points to 32-bit units. A thread owns whole words and loads up to four units at a time. Groups of scales
    end at units.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.arange(0, WORDS)
    UNITS: tl.constexpr = PER_WORD * BITS // 32
    EACH: tl.constexpr = 32 // BITS
    WIDE: tl.constexpr = 4 if UNITS % 4 == 0 else (2 if UNITS % 2 == 0 else 1)
    LAST: tl.constexpr = UNITS // WIDE - 1
    WHOLE: tl.constexpr = GROUP > 0 and GROUP % PER_WORD == 0  # one scale per word
    ZERO: tl.constexpr = 0x77777777 if BITS == 4 else (0x55555555 if BITS == 2 else 0)  # for words beyond the row
    lane = tl.arange(0, WIDE)[None, None, :]
    of_mask = mask + (safe * words)[:, None]
    of_values = values + (safe * words * UNITS)[:, None, None]
    of_scales = scales + (safe * groups)[:, None]
    total = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    # Loads complete in order, so the next values, masks and scales are loaded before the present ones are used.
    near = tl.minimum(word, words - 1)[None, :]
    ahead = tl.load(
        of_values + (near * UNITS + LAST * WIDE)[:, :, None] + lane, mask=(word < words)[None, :, None], other=ZERO
    )
    next_bits = tl.load(of_mask + near)
    scale = tl.full([ROWS, WORDS], 1.0, tl.float32)
    next_scale = scale
    if WHOLE:
        next_scale = tl.load(of_scales + near * PER_WORD // GROUP).to(tl.float32)
    for at in range(0, words, WORDS):
        near = tl.minimum(at + word, words - 1)[None, :]
        inside = (at + word < words)[None, :, None]
        later = at + WORDS + word
        beyond = tl.minimum(later, words - 1)[None, :]
        window = z + near * PITCH
        bits = next_bits
        next_bits = tl.load(of_mask + beyond)
        if WHOLE:
            scale = next_scale
            next_scale = tl.load(of_scales + beyond * PER_WORD // GROUP).to(tl.float32)
        sums = tl.zeros([ROWS, WORDS], dtype=tl.float32)
        for back in tl.static_range(LAST + 1):
            packed = ahead
            if back < LAST:
                ahead = tl.load(
                    of_values + (near * UNITS + (LAST - back - 1) * WIDE)[:, :, None] + lane, mask=inside, other=ZERO
                )
            else:
                ahead = tl.load(
                    of_values + (beyond * UNITS + LAST * WIDE)[:, :, None] + lane,
                    mask=(later < words)[None, :, None],
                    other=ZERO,
                )
            if WIDE == 4:
                even, odd = tl.split(tl.reshape(packed, [ROWS, WORDS, 2, 2]))
                unit0, unit2 = tl.split(even)
                unit1, unit3 = tl.split(odd)
            elif WIDE == 2:
                unit0, unit1 = tl.split(packed)
                unit2, unit3 = unit0, unit1
            else:
                unit0 = tl.reshape(packed, [ROWS, WORDS])
                unit1, unit2, unit3 = unit0, unit0, unit0
            for turn in tl.static_range(WIDE):
                if turn == WIDE - 4:
                    unit = unit3
                elif turn == WIDE - 3:
                    unit = unit2
                elif turn == WIDE - 2:
                    unit = unit1
                else:
                    unit = unit0
                if GROUP > 0 and not WHOLE:
                    first = near * PER_WORD + ((LAST - back) * WIDE + WIDE - 1 - turn) * EACH
                    own = tl.load(of_scales + first // GROUP).to(tl.float32)
                    some = tl.zeros([ROWS, WORDS], dtype=tl.float32)
                    bits, some = _walked(unit, bits, window, some, BITS, FLOAT)
                    sums += some * own
                else:
                    bits, sums = _walked(unit, bits, window, sums, BITS, FLOAT)
        if WHOLE:
            total += sums * scale
        else:
            total += sums
    result = tl.sum(total, 1)
    if SCALED and GROUP == 0:
        result *= tl.load(scales + safe).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)
