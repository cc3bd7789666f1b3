"""How one matrix is stored, and the one function that counts its bytes.

A compressed linear layer computes ``y = (x D) S + b``. Both factors are stored like ``nn.Linear`` weights, outputs
in rows: the dictionary as Dᵀ (atoms, d_in), the codes as Sᵀ (d_out, atoms). Each is described by a
:class:`MatrixSpec`; a group of layers that share a dictionary by a `cospadi.format.group.GroupSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from cospadi.format.patterns import balanced_nonzeros, parse_pattern
from cospadi.format.trellis import RATES, Trellis

FORMAT_VERSION = 2
BITS = (2, 3, 4, 5, 6, 8, 14, 16)


def _words(values: int, bits: int) -> int:
    """32-bit words that hold `values` numbers of `bits` bits."""
    return -(-values * bits // 32)


@dataclass(frozen=True)
class MatrixSpec:
    """How one matrix is stored, outputs in rows as in ``nn.Linear``.

    Attributes:
        rows: outputs (atoms of a dictionary, d_out of codes).
        columns: inputs (d_in of a dictionary, atoms of codes).
        pattern: ``"dense"``, ``"free"`` (any `nonzeros` of a row) or ``"n:m"``.
        nonzeros: stored values per row; equals `columns` for ``"dense"``.
        bits: 16: the model's 16-bit float; 14: bfloat16 without its two lowest mantissa bits; 2, 3, 4, 5, 6, 8:
            integers with scales; 1, 2, 3, 4 with a trellis.
        group: stored values that share a scale, along the row; 0 means the whole row.
        symmetric: integers around zero; otherwise a zero point of `bits` bits is stored beside every scale.
        half: integers in half steps. Symmetric: 2^bits levels around zero, none of them zero. Otherwise zero points may
            lie halfway between two levels and take one bit more.
        trellis: the values are trellis codes, with one scale per row.
    """

    rows: int
    columns: int
    pattern: str = "dense"
    nonzeros: int = 0
    bits: int = 16
    group: int = 0
    symmetric: bool = True
    half: bool = False
    trellis: Trellis | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a matrix of {self.rows}x{self.columns} cannot be stored")
        known = BITS if self.trellis is None else RATES
        if self.bits not in known:
            raise ValueError(f"bits must be one of {known}{' with a trellis' * (known is RATES)}, not {self.bits}")
        if self.half and not self.integer:
            raise ValueError(f"half steps are for integers, not for values of {self.bits} bits")
        if self.trellis is not None:
            if self.sparse or self.group or not self.symmetric or self.half:
                raise ValueError("trellis codes are dense, with one scale per row and no zero points or half steps")
            if self.bits > self.trellis.state:
                raise ValueError(f"a trellis of {self.trellis.state} state bits cannot hold {self.bits} bits a value")
        if self.group < 0:
            raise ValueError(f"group must not be negative, not {self.group}")
        if self.pattern == "dense":
            expected = self.columns
        else:
            balanced = parse_pattern(self.pattern)
            expected = self.nonzeros if balanced is None else balanced_nonzeros(self.columns, *balanced)
            if not 0 < expected <= self.columns:
                raise ValueError(f"{self.nonzeros} non-zeros of {self.columns} are not possible")
        if self.nonzeros not in (0, expected):
            raise ValueError(f"pattern {self.pattern} of {self.columns} holds {expected} values, not {self.nonzeros}")
        object.__setattr__(self, "nonzeros", expected)

    @property
    def sparse(self) -> bool:
        """Whether a mask is stored."""
        return self.pattern != "dense"

    @property
    def integer(self) -> bool:
        """Whether values are integers with scales."""
        return self.bits <= 8

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.nonzeros // self.group) if self.group else 1

    @property
    def centred(self) -> bool:
        """Whether levels are integers around zero, so that no zero point is subtracted."""
        return self.symmetric and not self.half

    @property
    def signed_bytes(self) -> bool:
        """Whether levels are stored as signed bytes, not as a bit stream."""
        return self.bits == 8 and self.centred

    @property
    def zero_bits(self) -> int:
        """Bits of a stored zero point; those of half steps count half steps."""
        return self.bits + 1 if self.half else self.bits

    def tensors(self, float_dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stored tensors, by role: values, mask, scales, zeros."""
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if self.trellis is not None:
            tiles = self.trellis.tiles(self.rows, self.columns)
            stored = {"values": ((*tiles, self.trellis.words(self.bits)), torch.int32)}
        elif self.bits == 16:
            stored = {"values": ((self.rows, self.nonzeros), float_dtype)}
        elif self.signed_bytes:
            stored = {"values": ((self.rows, self.nonzeros), torch.int8)}
        else:
            stored = {"values": ((self.rows, _words(self.nonzeros, self.bits)), torch.int32)}
        if self.sparse:
            stored["mask"] = ((self.rows, _words(self.columns, 1)), torch.int32)
        if self.integer:
            stored["scales"] = ((self.rows, self.groups), float_dtype)
            if not self.symmetric:
                stored["zeros"] = ((self.rows, _words(self.groups, self.zero_bits)), torch.int32)
        return stored

    @property
    def bytes(self) -> int:
        """Exact bytes of the stored tensors."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    @property
    def version(self) -> int:
        """The first format version that can describe the matrix."""
        return 2 if self.half or self.trellis is not None or self.bits in (5, 6) else 1

    def to_dict(self) -> dict[str, Any]:
        """What is needed to read the matrix, without defaults and without the shape."""
        out: dict[str, Any] = {"bits": self.bits}
        if self.sparse:
            out["pattern"] = self.pattern
            out["nonzeros"] = self.nonzeros
        if self.integer and self.group:
            out["group"] = self.group
        if not self.symmetric:
            out["symmetric"] = False
        if self.half:
            out["half"] = True
        if self.trellis is not None:
            out["trellis"] = self.trellis.to_dict()
        return out

    @classmethod
    def from_dict(cls, rows: int, columns: int, data: dict[str, Any]) -> MatrixSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: on unknown keys or impossible values.
        """
        unknown = set(data) - {"bits", "pattern", "nonzeros", "group", "symmetric", "half", "trellis"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        trellis = {"trellis": Trellis.from_dict(data["trellis"])} if "trellis" in data else {}
        return cls(rows, columns, **(data | trellis))


@dataclass(frozen=True)
class Stored:
    """A matrix as a solver leaves it, before packing.

    Attributes:
        matrix: (rows, columns) float, exactly on the grid given by scales and zeros where `spec.integer`. With a
            trellis the symbols instead, uint8 (tiles along rows, tiles along columns, values of a tile); value t of a
            tile is in its row t // inputs and column t % inputs.
        scales: (rows, spec.groups) for integer specs, already rounded to the 16-bit float they are stored in.
        zeros: (rows, spec.groups) zero points for asymmetric specs: integers, or multiples of ½ with `spec.half`.
        support: (rows, columns) bool for sparse specs; None: found from the matrix.
    """

    matrix: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    support: Tensor | None = None
