"""A decoder layer that is one linear map: the transform of ReplaceMe where it is not folded into another layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cospadi.layers.stored_layer import StoredLayer
from cospadi.layers.tensors import GUARD_DTYPE, GUARD_SHAPE


class LinearBlock(nn.Module):
    """y = x T, in place of a decoder layer; it has neither attention nor a cache.

    Args:
        width: of the hidden states.
        guard: path of a matrix of the layer that is replaced; the one-byte guard tensor takes its name, so that a
            reader that does not know the format stops at its shape.
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
            owner.add_module(name, StoredLayer())
            owner = owner.get_submodule(name)
        tensor = torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE, device=device)
        owner.register_parameter(leaf, nn.Parameter(tensor, False))

    @classmethod
    def in_place_of(cls, layer: nn.Module, width: int, extra_outputs: int | None) -> LinearBlock:
        """The identity map, on the device and in the dtype of the layer that it replaces."""
        guard, like = next((name, p) for name, p in layer.named_parameters() if p.ndim >= 2)
        block = cls(width, guard, extra_outputs, like.device, like.dtype)
        if like.device.type != "meta":
            block.set(torch.eye(width))
        return block

    @torch.no_grad()
    def set(self, transform: Tensor) -> None:
        """Take over a transform T (width, width) of row vectors: y = x T."""
        self.weight.copy_(transform.T)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map hidden states (..., width) → (..., width); the other arguments of a decoder layer are ignored."""
        out = nn.functional.linear(hidden_states, self.weight)
        return out if self.extra_outputs is None else (out, *[None] * self.extra_outputs)
