"""Rotations of a group's input: z = ((x ⊙ σ ⊙ ε) B), which spreads outliers before the weights are rounded.

ε are signs, σ optional scales, and B is block diagonal with orthonormal Walsh–Hadamard matrices
(`cospadi.format.hadamard`). With T = diag(σ ε) B, weights W' (d_in, d_out) that read z stand for W = T W'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.format.hadamard import hadamard
from cospadi.format.pack import pack_mask, unpack_bits

BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Rotation:
    """How the input of a group is transformed before it meets the dictionary.

    Attributes:
        block: size of the largest Walsh–Hadamard matrices, a power of two from 2 to 1024.
        scales: whether inputs are scaled, too.
    """

    block: int = 128
    scales: bool = True

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block not in BLOCKS:
            raise ValueError(f"a rotation in blocks of {self.block!r} is not known, only powers of two from 2 to 1024")
        if type(self.scales) is not bool:
            raise ValueError(f"scales of a rotation must be true or false, not {self.scales!r}")

    def tensors(self, d_in: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stored tensors, by role: signs, scales."""
        signs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"signs": ((-(-d_in // 32),), torch.int32)}
        return signs | {"scales": ((d_in,), dtype)} if self.scales else signs

    def bytes(self, d_in: int) -> int:
        """Exact bytes of the stored tensors."""
        return 4 * -(-d_in // 32) + (2 * d_in if self.scales else 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""
        return {"block": self.block} | ({} if self.scales else {"scales": False})

    @classmethod
    def from_dict(cls, data: Any) -> Rotation:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is anything else.
        """
        if not isinstance(data, dict) or "block" not in data or set(data) - {"block", "scales"}:
            raise ValueError(f"a rotation has a block and perhaps scales, not {data!r}")
        return cls(**data)


@dataclass(frozen=True)
class StoredRotation:
    """A rotation as a solver leaves it, before packing.

    Attributes:
        signs: ε, (d_in,) of ±1, any dtype.
        scales: σ, (d_in,) float, already rounded to the 16-bit float they are stored in; None without scales.
    """

    signs: Tensor
    scales: Tensor | None = None

    def pack(self, spec: Rotation, d_in: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors by role.

        Raises:
            ValueError: if sizes do not fit, a sign is not ±1, or scales are missing or superfluous.
        """
        if tuple(self.signs.shape) != (d_in,) or not bool((self.signs.abs() == 1).all()):
            raise ValueError(f"a rotation of {d_in} inputs needs as many signs of ±1, not {list(self.signs.shape)}")
        if (self.scales is not None) != spec.scales:
            raise ValueError(f"the rotation {'lacks' if spec.scales else 'has'} scales, its spec says otherwise")
        packed = {"signs": pack_mask((self.signs < 0).unsqueeze(0))[0]}
        if self.scales is None:
            return packed
        if tuple(self.scales.shape) != (d_in,):
            raise ValueError(f"a rotation of {d_in} inputs needs as many scales, not {list(self.scales.shape)}")
        return packed | {"scales": self.scales.to(dtype)}


def input_factors(packed: Mapping[str, Tensor], d_in: int, dtype: torch.dtype) -> Tensor:
    """ε ⊙ σ, (d_in,) `dtype`, differentiable in the scales."""
    factors = (1 - 2 * unpack_bits(packed["signs"].unsqueeze(0), 1, d_in)[0]).to(dtype)
    return factors * packed["scales"].to(dtype) if "scales" in packed else factors


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotated(x: Tensor, packed: Mapping[str, Tensor], rotation: Rotation) -> Tensor:
    """The transformed input z = x T, computed in float32 (float64 for float64) and cast back.

    Args:
        x: (…, d_in) float.
        packed: stored tensors of the rotation by role, on the device of x.
        rotation: how they are to be read.

    Returns:
        (…, d_in) in the dtype of x; differentiable in x and in the scales.
    """
    wide = _wide(x.dtype)
    return hadamard(x.to(wide) * input_factors(packed, x.shape[-1], wide), rotation.block).to(x.dtype)


def folded(rows: Tensor, packed: Mapping[str, Tensor], rotation: Rotation) -> Tensor:
    """Rows that read x, from rows that read z: (T W')ᵀ from W'ᵀ (…, d_in), in their dtype and on their device."""
    wide = _wide(rows.dtype)
    factors = input_factors(packed, rows.shape[-1], wide).to(rows.device)
    return (hadamard(rows.to(wide), rotation.block) * factors).to(rows.dtype)
