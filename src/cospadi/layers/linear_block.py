"""A decoder layer that is one linear map: ReplaceMe's transform where it is not folded into another layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LinearBlock(nn.Module):
    """y = x T, in the place of a decoder layer; it neither attends nor keeps a cache.

    Args:
        width: of the hidden states.
        guard: path of a matrix of the layer that it replaces; there the tensor of one byte lies.
        extra_outputs: as in :class:`~cospadi.model_view.ModelView`.
        device: of the parameters.
        dtype: of the transform.
    """

    def __init__(
        self,
        width: int,
        guard: str,
        extra_outputs: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.guard, self.extra_outputs = width, guard, extra_outputs
        self.weight = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype), False)
        owner: nn.Module = self
        *parents, leaf = guard.split(".")
        for name in parents:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(1, dtype=torch.uint8, device=device), False))

    @classmethod
    def in_place_of(cls, layer: nn.Module, width: int, extra_outputs: int | None) -> LinearBlock:
        """The identity, where and in which dtype the layer is."""
        guard, like = next((name, p) for name, p in layer.named_parameters() if p.ndim >= 2)
        block = cls(width, guard, extra_outputs, like.device, like.dtype)
        if like.device.type != "meta":
            block.set(torch.eye(width))
        return block

    @torch.no_grad()
    def set(self, transform: Tensor) -> None:
        """Take a transform T (width, width), in row vectors: y = x T."""
        self.weight.copy_(transform.T)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (..., width) → (..., width); whatever else a decoder layer gets is ignored."""
        out = nn.functional.linear(hidden_states, self.weight)
        return out if self.extra_outputs is None else (out, *[None] * self.extra_outputs)
