"""One Triton kernel for a block of error feedback or of coordinate descent on integer grids.

Inputs are decided one after another, but rows are independent given the Hessian, so a program takes a few rows through
all steps of a block. In PyTorch every step is a dozen small kernels, whose launches take far longer than their work.

Both recursions have the same form. With δ_i the change made by step i, step j decides on start_j + Σ_{i<j} M_ji δ_i.
For the sweep δ = q − w and M = −C; for the descent δ is the change of the value and M_ji = −H_ji / H_jj.
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

ROWS = 8  # per program: 32 bytes of every step, a whole sector; BLOCK × ROWS / 32 changes per thread
WARPS = 1  # so that a sum over steps needs no barrier
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³, where float32 holds integers only: adding it rounds to nearest even
FAR = tl.constexpr(2097152.0)  # far above all levels, far below where the magic number fails


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
        whole = tl.floor(zero)
        level = tl.div_rn(target, tl.where(scale > 0, scale, 1.0)) + (zero - whole)
        level = tl.where(level > FAR, FAR, tl.where(level < -FAR, -FAR, level))  # keeps NaN, unlike a minimum
        level = (level + MAGIC) - MAGIC + whole
        level = tl.where(level > high, high, tl.where(level < low, low, level))
        value = (level - zero) * scale
        change = value - base
        made = tl.where(place[:, None] == step, change[None, :], made)
        tl.store(values + at, value, mask=inside)
        tl.store(changes + at, change, mask=inside)


@dataclass(frozen=True)
class BlockKernels:
    """Decides inputs block by block.

    Attributes:
        grid: of all inputs.
    """

    grid: GridSteps

    def decided(self, starts: Tensor, bases: Tensor, moves: Tensor, inputs: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Run the steps of a block.

        Args:
            starts: (width, count) float32, the values to decide on before changes within the block are added.
            bases: (width, count) float32, the values that changes are measured from.
            moves: M (width, width) float32; only the part below the diagonal is read.
            inputs: (width,), the input of every step.

        Returns:
            values (width, count) on the grid, and changes, values − bases.
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
            targets: (width, count) float32, weights plus the feedback of earlier blocks.
            weights: (width, count) float32.
            coupling: (width, width) float32; entry [j, i] is the share of the error of step i that moves the target of
                step j > i.
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
            slope: (width, count) float32, curvature times all errors at the start of the block.
            near: (width, width) float32, the curvature within the block.
            inputs: (width,), the input of every step.

        Returns:
            new values and errors (width, count).
        """
        diagonal = near.diagonal()[:, None]
        values, changes = self.decided(values + slope / diagonal, values, -near / diagonal, inputs)
        return values, errors - changes


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel compiles and runs on a device; if not, a warning says so once."""
    try:
        one = torch.ones(1, 1, device=device)
        grid = GridSteps(one, one, torch.zeros(1, dtype=torch.int32, device=device), 0, 3)
        values, _ = BlockKernels(grid).decided(one, one, one, slice(None))
        return bool(values == 1)
    except Exception as error:  # whatever a compiler or a driver may raise
        logger.warning("Triton does not work on %s (%s): GPTQ runs input by input, which is slow", device, error)
        return False
