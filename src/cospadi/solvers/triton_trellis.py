"""The Viterbi search of trellis codes in one Triton kernel: a program takes one tile after another through both passes.

Per step, a program goes through all states in blocks. The least costs of the step before are read from a scratch array
that fits the first-level cache, levels are hashed on the fly, and for each group of states that share their successors
the cheapest is noted. No program holds more than a block in registers, whatever the number of states.
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import logging
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cospadi.format.trellis import level_table

logger = logging.getLogger(__name__)

PER_THREAD = 4  # groups of states at a time
WARPS = 8  # of a program where there are many tiles: registers and cache let several share a multiprocessor
FEW_WARPS = 32  # where there are fewer tiles than multiprocessors
PER_SM = 2  # programs a multiprocessor: one traces its path back while the other searches
DP4A = True  # sum the bytes of a hash in one instruction, on NVIDIA devices
SCRATCH = 2**31  # bytes of back pointers at most

MULTIPLIER = tl.constexpr(0x83DCD12D)
BYTES = tl.constexpr(0x00FF00FF)
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³; added to a whole number, that number is the low bits of the float
MAGIC_BITS = tl.constexpr(0x4B400000 - 510)  # as bits, less the mean of the sums of bytes


@triton.jit
def _level(state, ASM: tl.constexpr):
    """Levels float32 of states int32."""
    hashed = state.to(tl.uint32) * MULTIPLIER
    if ASM:
        bits = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 16843009, 1262484994;", "=r,r", [hashed], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        pairs = (hashed & BYTES) + ((hashed >> 8) & BYTES)
        bits = ((pairs + (pairs >> 16)) & 0xFFFF) + MAGIC_BITS
    return bits.to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def _search(
    targets,
    roots,
    first,
    steps,
    shift,
    costs,
    pointers,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Steps `first` to `steps` of a tile, value (step + shift) mod T at each; costs lie in the half of `first`.

    costs (2, 2^(L−K)): of group q at place (q mod 2^K) · 2^(L−2K) + (q >> K), so that the costs which a block of groups
    needs for states of equal low bits are adjacent. pointers (T, 2^(L−K)) uint8: low bits of a group's cheapest state.
    """
    LOW: tl.constexpr = 2**BITS
    GROUPS: tl.constexpr = 2 ** (STATE - BITS)
    STRIDE: tl.constexpr = 2 ** (STATE - BITS) // 2**BITS
    for step in range(first, steps):
        at = (step + shift) & (SIZE - 1)
        target = tl.load(targets + at)
        root = 1.0
        if WEIGHTED:
            root = tl.load(roots + at)
        old = costs + (step & 1) * GROUPS
        new = costs + ((step + 1) & 1) * GROUPS
        for begin in range(0, GROUPS, BLOCK):
            group = begin + tl.arange(0, BLOCK)
            place = group & (STRIDE - 1)
            best = tl.full([BLOCK], float("inf"), tl.float32)
            chosen = tl.zeros([BLOCK], tl.int32)
            for low in tl.static_range(LOW):
                miss = _level(group * LOW + low, ASM) - target
                if WEIGHTED:
                    miss *= root
                cost = tl.load(old + low * STRIDE + place) + miss * miss
                better = cost < best
                best = tl.where(better, cost, best)
                chosen = tl.where(better, low, chosen)
            tl.store(new + (group & (LOW - 1)) * STRIDE + (group >> BITS), best)
            tl.store(pointers + step * GROUPS + group, chosen.to(tl.uint8))
        tl.debug_barrier()  # the next step reads what other threads have written


@triton.jit(do_not_specialize=["tiles", "around"])
def _encode_kernel(
    targets,
    roots,
    symbols,
    costs,
    pointers,
    tiles,
    around,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Symbols uint8 (tiles, T) of targets float32 (tiles, T); costs and pointers have a part for every program."""
    LOW: tl.constexpr = 2**BITS
    GROUPS: tl.constexpr = 2 ** (STATE - BITS)
    STRIDE: tl.constexpr = 2 ** (STATE - BITS) // 2**BITS
    program = tl.program_id(0)
    costs += program * (2 * GROUPS)
    pointers += program.to(tl.int64) * (SIZE * GROUPS)
    for tile in range(program, tiles, tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * SIZE
        x, w, out = targets + offset, roots + offset, symbols + offset
        # the values around the seam, from any state
        for begin in range(0, GROUPS, BLOCK):
            tl.store(costs + begin + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))
        tl.debug_barrier()
        near = 2 * around
        _search(x, w, 0, near, SIZE - around, costs, pointers, SIZE, BITS, STATE, BLOCK, WEIGHTED, ASM)
        least = tl.min(tl.full([BLOCK], float("inf"), tl.float32))
        following = 0
        for begin in range(0, GROUPS, BLOCK):
            found = tl.load(costs + begin + tl.arange(0, BLOCK))  # the number of steps is even
            smallest = tl.min(found)
            place = begin + tl.argmin(found, 0)
            group = (place % STRIDE) * LOW + place // STRIDE
            following = tl.where(smallest < least, group, following)
            least = tl.minimum(smallest, least)
        seam = 0
        for back in range(around):
            seam = following * LOW + tl.load(pointers + (near - 1 - back) * GROUPS + following).to(tl.int32)
            following = seam % GROUPS
        tl.debug_barrier()
        # the whole tile, from that state to the same; its own cost does not matter
        for begin in range(0, GROUPS, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            group = (place % STRIDE) * LOW + place // STRIDE
            start = tl.where(group == seam // LOW, 0.0, float("inf"))
            tl.store(costs + GROUPS + place, start)
        tl.debug_barrier()
        _search(x, w, 1, SIZE, 0, costs, pointers, SIZE, BITS, STATE, BLOCK, WEIGHTED, ASM)
        tl.store(out, (seam % LOW).to(tl.uint8))
        following = seam % GROUPS
        for back in range(SIZE - 1):
            step = SIZE - 1 - back
            low = tl.load(pointers + step * GROUPS + following).to(tl.int32)
            tl.store(out + step, low.to(tl.uint8))
            following = (following * LOW + low) % GROUPS
        tl.debug_barrier()  # the next tile overwrites the pointers


def encode_tiles(targets: Tensor, roots: Tensor | None, bits: int, state: int, around: int) -> Tensor:
    """Symbols of tiles, as :func:`cospadi.solvers.trellis.encode` returns them.

    Args:
        targets: float32 (tiles, T), finite, in units of levels.
        roots: float32 (tiles, T) roots of the weights; None: all 1.
        bits: K.
        state: L.
        around: values on either side of the seam that decide about the state there.

    Returns:
        uint8 (tiles, T).
    """
    tiles, size = targets.shape
    targets = targets.contiguous()
    roots = None if roots is None else roots.contiguous()
    symbols = torch.empty(tiles, size, dtype=torch.uint8, device=targets.device)
    if not tiles:
        return symbols
    groups = 2 ** (state - bits)
    units = torch.cuda.get_device_properties(targets.device).multi_processor_count if targets.is_cuda else 1
    few = tiles <= units
    programs = max(1, min(tiles, units if few else PER_SM * units, SCRATCH // (size * groups)))
    warps = max(1, min(FEW_WARPS if few else WARPS, groups // (32 * PER_THREAD)))
    costs = torch.empty(programs * 2 * groups, device=targets.device)
    pointers = torch.empty(programs * size * groups, dtype=torch.uint8, device=targets.device)
    # Triton launches on the current device.
    with torch.cuda.device(targets.device) if targets.is_cuda else nullcontext():
        _encode_kernel[(programs,)](
            targets,
            targets if roots is None else roots,
            symbols,
            costs,
            pointers,
            tiles,
            around,
            SIZE=size,
            BITS=bits,
            STATE=state,
            BLOCK=min(groups, 32 * PER_THREAD * warps),
            WEIGHTED=roots is not None,
            ASM=DP4A and targets.is_cuda and torch.version.hip is None,
            num_warps=warps,
        )
    return symbols


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel compiles and runs on a device; if not, a warning says so once."""
    try:
        steps = torch.arange(64, dtype=torch.int64, device=device)
        symbols = (steps * steps // 7) % 4
        states = sum(symbols.roll(-place) << (2 * place) for place in range(4))
        targets = level_table(8, device)[states][None]
        return bool((encode_tiles(targets, None, 2, 8, 32).long() == symbols).all())
    except Exception as error:  # whatever a compiler or a driver may raise
        logger.warning("Triton does not work on %s (%s): trellis codes are encoded step by step", device, error)
        return False
