"""What every kind of spec and every solution can do, whatever the layers store.

A method returns a spec (how a group will be stored) from its plan and a solution (the numbers) from its solve. The
engine knows these two protocols only; `cospadi.checkpoint.formats` knows which spec belongs to which format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cospadi.format.leaves import TensorTable

PackedGroup = dict[str, Tensor]
"""The stored tensors of one group, as the journal keeps them."""


@dataclass(frozen=True)
class GroupShape:
    """Names and sizes of the layers of a group: all that a plan may know."""

    modules: tuple[str, ...]
    d_in: int
    d_out: tuple[int, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes at 16 bits a weight."""
        return 2 * self.d_in * sum(self.d_out)


class Spec(Protocol):
    """How one group of linear layers is stored."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the layers in the model, in order."""

    @property
    def method(self) -> str:
        """Name of the method that solves it."""

    @property
    def name(self) -> str:
        """Readable name of the group."""

    @property
    def shape(self) -> GroupShape:
        """Names and sizes of the layers."""

    @property
    def bytes(self) -> int:
        """Exact bytes of all stored tensors (biases excluded)."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same layers at 16 bits a weight."""

    def tensors(self, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
        """Shape and dtype of one module's tensors by parameter name, bias and guard excluded."""

    def row(self, layer: int | None = None) -> dict[str, Any]:
        """The group as it stands in reports; `layer` is the index of its first decoder layer."""

    def weight(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The weights of all modules side by side, (d_in, sum of d_out) float64, that the stored tensors stand for."""

    def rebuild(self, packed: Mapping[str, Tensor]) -> list[Tensor]:
        """The weight W (d_in, d_out) float64 of every module that the stored tensors stand for."""

    def solved_by(self, method: str) -> Self:
        """The same spec under the name of another method."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""


class Solution(Protocol):
    """The numbers that a solve found for one spec."""

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or Inf."""

    def pack(self, spec: Any, dtype: torch.dtype) -> PackedGroup:
        """The stored tensors; floats in `dtype`, 16 bits."""
