"""Normal equations of a linear fit, summed over tokens, so that memory does not grow with the text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cospadi.calibration.statistics import full_precision
from cospadi.errors import NumericalError

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class NormalEquations:
    """Normal equations of min ‖M T − R‖² over T, for M (tokens, p) and R (tokens, d), which are not stored.

    Attributes:
        gram: MᵀM / tokens, float64 (p, p), symmetric, on the device of the sums.
        cross: MᵀR / tokens, float64 (p, d), on the same device.
        energy: ‖R‖² / tokens.
        tokens: number of tokens.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    tokens: int

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The normal equations of both texts together."""
        if not isinstance(other, NormalEquations):
            return NotImplemented
        tokens = self.tokens + other.tokens
        mine, theirs = self.tokens / tokens, other.tokens / tokens
        return NormalEquations(
            mine * self.gram + theirs * other.gram,
            mine * self.cross + theirs * other.cross,
            mine * self.energy + theirs * other.energy,
            tokens,
        )

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (p,), ascending, and eigenvectors (p, p) of the Gram matrix."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.clamp_min(0), vectors

    def loss(self, transform: Tensor) -> float:
        """‖M T − R‖² / tokens.

        Args:
            transform: T (p, d).
        """
        wide = transform.to(self.gram)
        square = (wide * (self.gram @ wide)).sum()
        return max(0.0, float(square - 2 * (wide * self.cross).sum()) + self.energy)


class Sums:
    """Builds :class:`NormalEquations` from batches.

    Products are float32 over at most 512 tokens (float64 for float64 rows), their sums float64.

    Args:
        width: p.
        device: of the sums.
        targets: d; default: p.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", targets: int | None = None) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = self.gram.new_zeros(width, width if targets is None else targets)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows of M (tokens, p) and R (tokens, d), without padding."""
        with full_precision():
            for m, r in zip(torch.split(inputs, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS), strict=True):
                dtype = torch.float64 if m.dtype == torch.float64 else torch.float32
                m, r = m.to(self.gram.device, dtype), r.to(self.gram.device, dtype)
                self.gram += m.T @ m
                self.cross += m.T @ r
                self.energy += r.square().sum(dtype=torch.float64)
        self.tokens += len(inputs)

    def finish(self, name: str) -> NormalEquations:
        """Divide the sums by the number of tokens.

        Args:
            name: of the summed activations, for messages.

        Raises:
            NumericalError: if an activation was NaN or Inf, or so large that its square overflows.
        """
        if not bool(self.gram.isfinite().all() & self.cross.isfinite().all() & self.energy.isfinite()):
            raise NumericalError(
                f"{name}: NaN or Inf in its activations: the model overflows on this text (try bfloat16 or float32 "
                "weights) or is damaged"
            )
        gram = (self.gram + self.gram.T) / 2 / self.tokens
        return NormalEquations(gram, self.cross / self.tokens, float(self.energy) / self.tokens, self.tokens)
