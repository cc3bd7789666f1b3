"""Decoder layers whose residual stream changes basis and width between sublayers (SliceGPT, arXiv 2401.15024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.layers.stored_layer import StoredLayer
from cospadi.layers.tensors import GUARD


@dataclass(frozen=True)
class BlockParts:
    """Names of the children of a decoder layer that computes ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
        mixer_norm: normalisation before the attention.
        mixer: the attention.
        mlp_norm: normalisation before the MLP.
        mlp: the MLP.
    """

    mixer_norm: str
    mixer: str
    mlp_norm: str
    mlp: str


class SlicedNorm(StoredLayer):
    """RMS normalisation of a vector that was wider: ``y = x / sqrt(Σx²/full_width + eps)``, without a weight.

    The entries cut away count as zero in the mean (SliceGPT, section 3). The weight is folded into the matrices that
    read y. Sums are in float32, or in float64 for float64 inputs.
    """

    def __init__(self, width: int, full_width: int, eps: float) -> None:
        super().__init__()
        self.width, self.full_width, self.eps = width, full_width, eps
        self.register_parameter(GUARD, None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (…, width) in the dtype of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.square().sum(-1, keepdim=True) / self.full_width
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Width, original width and eps in one line."""
        return f"{self.width} of {self.full_width}, eps={self.eps}"


class SlicedBlock(nn.Module):
    """A decoder layer with linear maps on its residual paths.

    Never instantiated directly: :func:`make_sliced` changes the class of an existing decoder layer to a subclass of
    both this class and its own, so that code that looks for the original class (hidden states, device maps, gradient
    checkpointing) still finds it.
    """

    parts: BlockParts
    mixer_shortcut: nn.Linear
    mlp_shortcut: nn.Linear

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Attention and MLP, each added to its shortcut of the residual stream.

        Args:
            hidden_states: (…, width of the incoming basis).
            **kwargs: for the attention.

        Returns:
            (…, width of the outgoing basis).
        """
        parts = self.parts
        out = getattr(self, parts.mixer)(getattr(self, parts.mixer_norm)(hidden_states), **kwargs)
        mixed = out[0] if isinstance(out, tuple) else out
        hidden_states = self.mixer_shortcut(hidden_states) + mixed
        normed = getattr(self, parts.mlp_norm)(hidden_states)
        result: Tensor = self.mlp_shortcut(hidden_states) + getattr(self, parts.mlp)(normed)
        return result

    def __reduce_ex__(self, protocol: object) -> Any:
        # a class created at run time cannot be found by name, so pickles and copies create it again
        return _bare, (type(self).__mro__[2],), self.__dict__


def _bare(kind: type[nn.Module]) -> nn.Module:
    key: Any = kind
    made = _subclass(key)
    block: nn.Module = made.__new__(made)
    return block


@cache
def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (SlicedBlock, kind), {"__module__": kind.__module__})


def make_sliced(block: nn.Module, parts: BlockParts, norms: tuple[SlicedNorm, SlicedNorm], width_out: int) -> None:
    """Turn a decoder layer into a sliced one, in place. The weights of the shortcuts are unset.

    The layer's linear layers must be replaced separately.

    Args:
        block: a decoder layer.
        parts: names of its children.
        norms: replace its two norms; their widths are those of the residual stream.
        width_out: width of its output.
    """
    like = next(p for p in block.parameters() if p.is_floating_point())
    setattr(block, parts.mixer_norm, norms[0])
    setattr(block, parts.mlp_norm, norms[1])
    kind: Any = type(block)
    block.__class__ = _subclass(kind)
    assert isinstance(block, SlicedBlock)
    block.parts = parts
    block.mixer_shortcut = nn.Linear(norms[0].width, norms[1].width, False, like.device, like.dtype)
    block.mlp_shortcut = nn.Linear(norms[1].width, width_out, False, like.device, like.dtype)
