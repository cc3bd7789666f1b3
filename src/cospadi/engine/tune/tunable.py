"""Factors as parameters: the weights that packed tensors stand for, differentiable, always on the stored grid.

Masks, zero points, signs and the symbols of a trellis stay. Rounding is straight-through: forward, the number that
would be stored; backward, as if there were no rounding. Integer values are held in units of their levels, beside the
logarithm of their scale, so that a scale moves all of its values and no step can make it negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.format import Factors, GroupSpec, MatrixSpec, Packed, Stored, StoredRotation, part_of, split_codes
from cospadi.format.pack import decode_values, integer_range, spread, unpack_mask, unpack_symbols, zero_points
from cospadi.format.rotation import Rotation, folded, input_factors


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
        self.support = unpack_mask(packed["mask"], spec.columns) if spec.sparse else None
        if not spec.integer:
            self.knobs = [knob(decode_values(packed, spec, torch.float32))]
            return
        self._scales = packed["scales"].float()
        turn = knob(torch.zeros_like(self._scales), 1.0)
        levels = decode_values(packed | {"scales": torch.ones_like(self._scales)}, spec, torch.float32)
        if spec.trellis is not None:
            self._levels, self._symbols, self.knobs = levels, unpack_symbols(packed, spec), [turn]
            return
        levels = torch.where(spread(self._scales, spec) != 0, levels, 0.0)
        self.knobs = [knob(levels), turn]
        low, high = integer_range(spec.bits, spec.symmetric, spec.half)
        self._zeros = None if spec.centred else zero_points(packed, spec)
        offset = torch.zeros_like(levels) if self._zeros is None else spread(self._zeros, spec).float()
        self._low, self._high, self._between = low - offset, high - offset, -offset % 1

    def _scale(self) -> Tensor:
        return stored_float(self._scales * self.knobs[-1].tensor.exp(), 16, self.dtype)

    def values(self) -> Tensor:
        """Stored values (rows, nonzeros) float32."""
        latent = self.knobs[0].tensor
        if not self.spec.integer:
            return stored_float(latent, self.spec.bits, self.dtype)
        if self.spec.trellis is not None:
            return self._levels * self._scale()
        inside = torch.minimum(torch.maximum(latent, self._low), self._high)
        rounded = (inside.detach() - self._between).round() + self._between
        return straight_through(inside, rounded) * spread(self._scale(), self.spec)

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
        if not self.spec.integer:
            return Stored(self.matrix(), support=self.support)
        if self.spec.trellis is not None:
            return Stored(self._symbols, self._scale())
        return Stored(self.matrix(), self._scale(), self._zeros, self.support)


class TunableRotation:
    """The rotation of one group's input: its scales, held as factors of what they were.

    Args:
        packed: its tensors by role.
        rotation: how they are stored.
        d_in: inputs.
        dtype: 16-bit float of the scales.
    """

    def __init__(self, packed: Packed, rotation: Rotation, d_in: int, dtype: torch.dtype) -> None:
        self.rotation, self.dtype, self._signs = rotation, dtype, packed["signs"]
        self._ones = input_factors({"signs": packed["signs"]}, d_in, torch.float32)
        self._scales = packed["scales"].float() if rotation.scales else None
        self.knobs = [] if self._scales is None else [knob(torch.zeros_like(self._scales), 1.0)]

    def _scale(self) -> Tensor | None:
        if self._scales is None:
            return None
        return stored_float(self._scales * self.knobs[0].tensor.exp(), 16, self.dtype)

    def folded(self, rows: Tensor) -> Tensor:
        """Rows (d_out, d_in) that read x, from rows that read x rotated."""
        scales = self._scale()
        return folded(rows, {"signs": self._signs} | ({} if scales is None else {"scales": scales}), self.rotation)

    @torch.no_grad()
    def stored(self) -> StoredRotation:
        """As it would be packed."""
        return StoredRotation(self._ones, self._scale())


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
        tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
        codes, dictionary = part_of(tensors, "codes"), part_of(tensors, "dictionary")
        if spec.stacked:
            self.codes = [TunableMatrix(codes, spec.codes, dtype)]
        else:
            parts = enumerate(split_codes(spec, codes))
            self.codes = [TunableMatrix(part, spec.module_codes(index), dtype) for index, part in parts]
        self.dictionary = TunableMatrix(dictionary, spec.dictionary, dtype) if spec.dictionary is not None else None
        self.rotation: TunableRotation | None = None
        if spec.rotation is not None:
            self.rotation = TunableRotation(part_of(tensors, "rotation"), spec.rotation, spec.d_in, dtype)

    @property
    def knobs(self) -> list[Knob]:
        """All that is tuned."""
        parts = [*self.codes, self.dictionary, self.rotation]
        return [knob for part in parts if part is not None for knob in part.knobs]

    def weights(self) -> tuple[Tensor, ...]:
        """Each module's weight (d_out, d_in) float32, as ``nn.Linear`` holds it."""
        weight = torch.cat([part.matrix() for part in self.codes])
        if self.dictionary is not None:
            weight = weight @ self.dictionary.matrix()
        if self.rotation is not None:
            weight = self.rotation.folded(weight)
        return torch.split(weight, list(self.spec.d_out))

    def stored_codes(self) -> Stored:
        """The codes of all modules, as they would be packed."""
        parts = [part.stored() for part in self.codes]
        if len(parts) == 1:
            return parts[0]
        scales = [part.scales for part in parts if part.scales is not None]
        return Stored(torch.cat([part.matrix for part in parts]), torch.cat(scales))

    def packed(self) -> dict[str, Tensor]:
        """Packed tensors on the CPU."""
        dictionary = None if self.dictionary is None else self.dictionary.stored()
        rotation = None if self.rotation is None else self.rotation.stored()
        factors = Factors(self.stored_codes(), dictionary, rotation=rotation)
        return {key: tensor.cpu() for key, tensor in factors.pack(self.spec, self.dtype).items()}
