"""Integer grids with a scale, and perhaps a zero point, for every group of values: value = (level − zero) · scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The grid of every group.

    Attributes:
        scales: (rows, groups) float32, exact in bfloat16, not negative; 0 where all values of the group are zero.
        zeros: (rows, groups) float32 integers; all zero for a symmetric grid.
        low: least level.
        high: largest level.
    """

    scales: Tensor
    zeros: Tensor
    low: int
    high: int

    def snap(self, values: Tensor) -> Tensor:
        """Nearest grid values, for values with one dimension more than the scales or as many."""
        scales, zeros = self.scales, self.zeros
        if values.dim() > scales.dim():
            scales, zeros = scales[..., None], zeros[..., None]
        safe = torch.where(scales > 0, scales, 1.0)
        return ((values / safe).round().add_(zeros).clamp_(self.low, self.high) - zeros) * scales

    def at(self, rows: Tensor | slice, groups: Tensor | int) -> "Grid":
        """The grids of some groups."""
        return Grid(self.scales[rows, groups], self.zeros[rows, groups], self.low, self.high)

    def steps(self, columns: int, size: int) -> "GridSteps":
        """The grids of all columns of a dense matrix with groups of `size`, by groups."""
        groups = torch.arange(columns, dtype=torch.int32, device=self.scales.device) // size
        return GridSteps(self.scales.T.contiguous(), self.zeros.T.contiguous(), groups, self.low, self.high)


@dataclass(frozen=True)
class GridSteps:
    """Grids as they are met input by input: every input of a dense matrix goes to the nearest value of its group's.

    Attributes:
        scales: (groups, count) float32, contiguous.
        zeros: (groups, count) float32, contiguous.
        groups: (n,) int32, group of every input, in the order of the model.
        low: least level.
        high: largest level.
    """

    scales: Tensor
    zeros: Tensor
    groups: Tensor
    low: int
    high: int

    def decide(self, inputs: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
        """``decide(targets (count,), step) -> values (count,)`` of steps that take these inputs in turn."""
        groups = self.groups.tolist()

        def nearest(targets: Tensor, step: int) -> Tensor:
            group = groups[inputs[step]]
            return Grid(self.scales[group], self.zeros[group], self.low, self.high).snap(targets)

        return nearest
