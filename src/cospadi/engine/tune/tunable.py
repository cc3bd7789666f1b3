"""Factors as parameters: the weights that packed tensors stand for, differentiable, always on the stored grid.

Masks and zero points stay. Rounding is straight-through: forward, the number that would be stored; backward, as if
there were no rounding. Integer values are held in units of their levels, beside the logarithm of their scale, so that a
scale moves all of its values and no step can make it negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.format import Factors, GroupSpec, MatrixSpec, Packed, Stored, split_packed
from cospadi.format.pack import decode_values, integer_range, spread, unpack_bits, unpack_mask


@dataclass(frozen=True)
class Knob:
    """Something that is tuned.

    Attributes:
        tensor: float32 leaf.
        unit: typical size of its entries; learning rates are shares of it.
    """

    tensor: Tensor
    unit: float


def knob(tensor: Tensor, unit: float | None = None) -> Knob:
    """A leaf with a gradient; its unit is its root mean square unless given."""
    leaf = tensor.detach().float().clone().requires_grad_(True)
    return Knob(leaf, float(leaf.detach().square().mean().sqrt()) if unit is None else unit)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` forward, the gradient of `value` backward."""
    return value + (rounded - value).detach()


def stored_float(value: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Rounded to the 16-bit float `dtype` (or to bfloat16 without its two lowest bits), straight-through."""
    if bits != 14:
        return straight_through(value, value.detach().to(dtype).to(value.dtype))
    pattern = value.detach().to(torch.bfloat16).view(torch.int16).int()
    cut = ((pattern + 2) >> 2 << 2).to(torch.int16).view(torch.bfloat16)
    return straight_through(value, cut.to(value.dtype))


class TunableMatrix:
    """One stored matrix.

    Args:
        packed: its tensors by role.
        spec: how it is stored.
        dtype: 16-bit float of values and scales.
    """

    def __init__(self, packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        values = decode_values(packed, spec, torch.float32)
        self.support = unpack_mask(packed["mask"], spec.columns) if spec.sparse else None
        if not spec.integer:
            self.knobs = [knob(values)]
            return
        self._scales = packed["scales"].float()
        wide = spread(self._scales, spec)
        levels = torch.where(wide != 0, values / wide, 0.0).round()
        self.knobs = [knob(levels), knob(torch.zeros_like(self._scales), 1.0)]
        low, high = integer_range(spec.bits, spec.symmetric)
        self._zeros = None if spec.symmetric else unpack_bits(packed["zeros"], spec.bits, spec.groups)
        offset = 0.0 if self._zeros is None else spread(self._zeros, spec).float()
        self._low, self._high = low - offset, high - offset

    def _scale(self) -> Tensor:
        return stored_float(self._scales * self.knobs[1].tensor.exp(), 16, self.dtype)

    def values(self) -> Tensor:
        """Stored values (rows, nonzeros) float32."""
        latent = self.knobs[0].tensor
        if not self.spec.integer:
            return stored_float(latent, self.spec.bits, self.dtype)
        low, high = torch.as_tensor(self._low, device=latent.device), torch.as_tensor(self._high, device=latent.device)
        inside = torch.minimum(torch.maximum(latent, low), high)
        return straight_through(inside, inside.detach().round()) * spread(self._scale(), self.spec)

    def matrix(self) -> Tensor:
        """The matrix (rows, columns) float32."""
        values = self.values()
        if self.support is None:
            return values
        # unlike a scatter by indices, this is deterministic on GPUs without a sort
        return values.new_zeros(self.spec.rows, self.spec.columns).masked_scatter(self.support, values)

    @torch.no_grad()
    def stored(self) -> Stored:
        """As it would be packed."""
        scales = self._scale() if self.spec.integer else None
        return Stored(self.matrix(), scales, self._zeros if self.spec.integer else None, self.support)


class TunableGroup:
    """The weights of one group.

    Args:
        spec: how the group is stored.
        tensors: packed, keyed as `pack_factors` does.
        dtype: 16-bit float of the stored tensors.
        device: where to compute.
    """

    def __init__(self, spec: GroupSpec, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype = spec, dtype
        dictionary, codes = split_packed({key: tensor.to(device) for key, tensor in tensors.items()})
        self.codes = TunableMatrix(codes, spec.codes, dtype)
        self.dictionary: TunableMatrix | None = None
        if dictionary is not None and spec.dictionary is not None:
            self.dictionary = TunableMatrix(dictionary, spec.dictionary, dtype)

    @property
    def knobs(self) -> list[Knob]:
        """All that is tuned."""
        return self.codes.knobs + (self.dictionary.knobs if self.dictionary else [])

    def weights(self) -> tuple[Tensor, ...]:
        """Each module's weight (d_out, d_in) float32, as ``nn.Linear`` holds it."""
        weight = self.codes.matrix()
        if self.dictionary is not None:
            weight = weight @ self.dictionary.matrix()
        return torch.split(weight, list(self.spec.d_out))

    def packed(self) -> dict[str, Tensor]:
        """Packed tensors on the CPU."""
        factors = Factors(self.codes.stored(), self.dictionary.stored() if self.dictionary else None)
        return {key: tensor.cpu() for key, tensor in factors.pack(self.spec, self.dtype).items()}
