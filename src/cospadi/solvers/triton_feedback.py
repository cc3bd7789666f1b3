"""A block of error feedback or of coordinate descent on integer grids, in one Triton kernel.

Inputs are decided one after the other, but rows are independent given the Hessian: a program takes a few rows through
all steps of a block. In PyTorch every step is a dozen small kernels, whose launches take far longer than their work.

Both recursions are one: with δ_i the change that step i made to what it began with, step j decides on
start_j + Σ_{i<j} M_ji δ_i. For the sweep δ = q − w and M = −C; for the descent δ is how far a value moves, and
M_ji = −H_ji / H_jj.
"""
# Triton's arguments have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cospadi.solvers.grid import GridSteps

logger = logging.getLogger(__name__)

ROWS = 8  # a program: 32 bytes of every step, a whole sector; BLOCK × ROWS / 32 changes a thread
WARPS = 1  # a sum over steps then needs no barrier
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³, where float32 has whole numbers only: adding it rounds to nearest even
FAR = tl.constexpr(2097152.0)  # well beyond all levels, well below where the magic number fails


@triton.jit(do_not_specialize=["width", "count", "low", "high"])
def _decide_kernel(
    starts,
    bases,
    moves,
    scales,
    zeros,
    groups,
    values,
    changes,
    width,
    count,
    low,
    high,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Values and changes (width, count) of a block of steps, all float32, width ≤ BLOCK.

    starts and bases (width, count); moves M (width, width); scales and zeros (all groups, count); groups (width,).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    place = tl.arange(0, BLOCK)
    made = tl.zeros([BLOCK, ROWS], dtype=tl.float32)
    for step in range(width):
        at = step * count + row
        group = tl.load(groups + step) * count + row
        move = tl.load(moves + step * width + place, mask=place < step, other=0.0)
        start = tl.load(starts + at, mask=inside, other=0.0)
        base = tl.load(bases + at, mask=inside, other=0.0)
        scale = tl.load(scales + group, mask=inside, other=0.0)
        zero = tl.load(zeros + group, mask=inside, other=0.0)
        target = start + tl.sum(move[:, None] * made, axis=0)
        level = tl.div_rn(target, tl.where(scale > 0, scale, 1.0))
        level = tl.where(level > FAR, FAR, tl.where(level < -FAR, -FAR, level))  # keeps NaN, unlike a minimum
        level = (level + MAGIC) - MAGIC + zero
        level = tl.where(level > high, high, tl.where(level < low, low, level))
        value = (level - zero) * scale
        change = value - base
        made = tl.where(place[:, None] == step, change[None, :], made)
        tl.store(values + at, value, mask=inside)
        tl.store(changes + at, change, mask=inside)


@dataclass(frozen=True)
class BlockKernels:
    """Decides blocks of inputs.

    Attributes:
        grid: of all inputs.
    """

    grid: GridSteps

    def decided(self, starts: Tensor, bases: Tensor, moves: Tensor, inputs: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Go through the steps of a block.

        Args:
            starts: (width, count) float32, what steps decide on but for changes within the block.
            bases: (width, count) float32, what changes are counted from.
            moves: M (width, width) float32; read below the diagonal only.
            inputs: (width,), the input of every step.

        Returns:
            values (width, count), on the grid, and changes, values − bases.
        """
        width, count = starts.shape
        starts, bases, moves = starts.contiguous(), bases.contiguous(), moves.contiguous()
        values, changes = torch.empty_like(starts), torch.empty_like(starts)
        # Triton launches on the current device.
        with torch.cuda.device(starts.device) if starts.is_cuda else nullcontext():
            _decide_kernel[(triton.cdiv(count, ROWS),)](
                starts,
                bases,
                moves,
                self.grid.scales,
                self.grid.zeros,
                self.grid.groups[inputs],
                values,
                changes,
                width,
                count,
                float(self.grid.low),
                float(self.grid.high),
                BLOCK=max(16, triton.next_power_of_2(width)),
                ROWS=ROWS,
                num_warps=WARPS,
            )
        return values, changes

    def sweep_block(
        self, targets: Tensor, weights: Tensor, coupling: Tensor, inputs: Tensor | slice
    ) -> tuple[Tensor, Tensor]:
        """The steps of a block of :func:`cospadi.solvers.feedback.sweep`.

        Args:
            targets: (width, count) float32, weights and the feedback of earlier blocks.
            weights: (width, count) float32.
            coupling: (width, width) float32; [j, i] is how much of the error of step i the target of step j > i takes.
            inputs: (width,), the input of every step.

        Returns:
            values and errors (width, count).
        """
        values, changes = self.decided(targets, weights, -coupling, inputs)
        return values, changes.neg_()

    def refine_block(
        self, values: Tensor, errors: Tensor, slope: Tensor, near: Tensor, inputs: Tensor | slice
    ) -> tuple[Tensor, Tensor]:
        """The steps of a block of :func:`cospadi.solvers.feedback.refine`, where all values may change.

        Args:
            values: (width, count) float32.
            errors: (width, count) float32.
            slope: (width, count) float32, curvature times all errors as the block begins.
            near: (width, width) float32, the block's own part of the curvature.
            inputs: (width,), the input of every step.

        Returns:
            new values and errors (width, count).
        """
        diagonal = near.diagonal()[:, None]
        values, changes = self.decided(values + slope / diagonal, values, -near / diagonal, inputs)
        return values, errors - changes


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel compiles and runs there; says once if not."""
    try:
        one = torch.ones(1, 1, device=device)
        grid = GridSteps(one, one, torch.zeros(1, dtype=torch.int32, device=device), 0, 3)
        values, _ = BlockKernels(grid).decided(one, one, one, slice(None))
        return bool(values == 1)
    except Exception as error:  # whatever a compiler or a driver may raise
        logger.warning("Triton does not work on %s (%s): GPTQ goes input by input, which is slow", device, error)
        return False
