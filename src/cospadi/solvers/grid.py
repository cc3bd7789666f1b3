"""Integer grids: each group of values has a scale and, if asymmetric, a zero point. value = (level − zero) · scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One grid per group of values.

    Attributes:
        scales: (rows, groups) float32, exact in bfloat16, non-negative; 0 where all values of the group are zero.
        zeros: (rows, groups) float32 integers, or multiples of ½ where `half`. Of a symmetric grid: the middle of its
            levels, which is 0 or, where `half`, between two levels.
        low: smallest level.
        high: largest level.
        half: zero points may lie halfway between two levels.
    """

    scales: Tensor
    zeros: Tensor
    low: int
    high: int
    half: bool = False

    def snap(self, values: Tensor) -> Tensor:
        """Nearest grid values; `values` has as many dimensions as the scales, or one more (the group)."""
        scales, zeros = self.scales, self.zeros
        if values.dim() > scales.dim():
            scales, zeros = scales[..., None], zeros[..., None]
        safe = torch.where(scales > 0, scales, 1.0)
        if self.half:
            return ((values / safe).add_(zeros).round_().clamp_(self.low, self.high) - zeros) * scales
        return ((values / safe).round().add_(zeros).clamp_(self.low, self.high) - zeros) * scales

    def at(self, rows: Tensor | slice, groups: Tensor | int) -> "Grid":
        """The grids of some rows and groups."""
        return replace(self, scales=self.scales[rows, groups], zeros=self.zeros[rows, groups])

    def spread(self, mask: Tensor, size: int) -> "Grid":
        """One grid per matrix entry: those inside the mask get the grid of their group.

        Args:
            mask: bool (rows, columns) with the same number of stored values in every row.
            size: stored values per group.
        """
        group = group_of(mask, size)
        return replace(self, scales=self.scales.gather(1, group), zeros=self.zeros.gather(1, group))

    def steps(self, columns: int, size: int) -> "GridSteps":
        """The grids of a dense matrix with groups of `size` columns, laid out for processing input by input."""
        groups = torch.arange(columns, dtype=torch.int32, device=self.scales.device) // size
        scales, zeros = self.scales.T.contiguous(), self.zeros.T.contiguous()
        return GridSteps(scales, zeros, groups, self.low, self.high, self.half)


@dataclass(frozen=True)
class GridSteps:
    """The grids of a dense matrix in the layout that processing input by input needs.

    Attributes:
        scales: (groups, count) float32, contiguous.
        zeros: (groups, count) float32, contiguous.
        groups: (n,) int32, the group of every input, in model order.
        low: smallest level.
        high: largest level.
        half: zero points may lie halfway between two levels.
    """

    scales: Tensor
    zeros: Tensor
    groups: Tensor
    low: int
    high: int
    half: bool = False

    def decide(self, inputs: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
        """``decide(targets (count,), step) -> values (count,)`` for steps that process these inputs in turn."""
        groups = self.groups.tolist()

        def nearest(targets: Tensor, step: int) -> Tensor:
            group = groups[inputs[step]]
            return Grid(self.scales[group], self.zeros[group], self.low, self.high, self.half).snap(targets)

        return nearest


def group_of(mask: Tensor, size: int) -> Tensor:
    """The group of each stored value of a sparse matrix, counted along its row.

    Args:
        mask: bool (rows, columns).
        size: stored values per group.

    Returns:
        int64 (rows, columns); entries outside the mask take the group of the stored value before them.
    """
    return (mask.cumsum(1) - 1).clamp_min(0) // size
