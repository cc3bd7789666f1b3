"""Second moments of a layer's input: what whitening needs from the calibration text.

They are sums over tokens, so statistics may be collected in pieces and in any order.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cospadi.calibration.loss_gram import LossGram, Weights
from cospadi.errors import NumericalError

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Statistics:
    """Sums over the tokens of one linear group's input.

    Attributes:
        gram: Σ x xᵀ, float64 (d, d), symmetric.
        abs_sum: Σ |x|, float64 (d,).
        tokens: their number.
        loss: loss-weighted Grams by the name of the layer that reads the input, as far as they were asked for.
    """

    gram: Tensor
    abs_sum: Tensor
    tokens: int
    loss: Mapping[str, LossGram] = field(default_factory=dict)

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both texts together, without loss-weighted Grams: a weight is relative to its own text."""
        if not isinstance(other, Statistics):
            return NotImplemented
        return Statistics(self.gram + other.gram, self.abs_sum + other.abs_sum, self.tokens + other.tokens)

    @property
    def mean_gram(self) -> Tensor:
        """G = XᵀX / tokens (d, d)."""
        return self.gram / max(self.tokens, 1)

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| per channel (d,)."""
        return self.abs_sum / max(self.tokens, 1)


class Accumulator:
    """Accumulates `Statistics` from batches, in place.

    Products over at most `CHUNK_TOKENS` tokens are computed in float32 and summed in float64. The error stays that of
    one short product, at a fraction of the cost of float64 products, which consumer GPUs compute 64 times slower.

    Args:
        name: of the layer, for messages.
        size: d, the number of input channels.
        device: on which to accumulate.
        weights: of the tokens, by the name of the layer that reads the input; tokens are then added in their order,
            without a mask.
    """

    def __init__(
        self,
        name: str,
        size: int,
        device: torch.device | str = "cpu",
        weights: Mapping[str, Weights] | None = None,
    ) -> None:
        self.name = name
        self.weights = dict(weights or {})
        self.roots = {key: item.values.sqrt().to(device) for key, item in self.weights.items()}
        self.weighted = {key: torch.zeros(size, size, dtype=torch.float64, device=device) for key in self.weights}
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: (..., d), any float dtype.
            mask: (...), true (or 1) at real tokens; None: all tokens are real.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).to(rows.device, torch.bool)]
        with full_precision():
            for part in torch.split(rows, CHUNK_TOKENS):
                wide = part.to(self.gram.device, torch.float64 if part.dtype == torch.float64 else torch.float32)
                self.gram += wide.T @ wide
                self.abs_sum += wide.abs().sum(0, dtype=torch.float64)
                for key, root in self.roots.items():
                    own = wide * root[self.tokens : self.tokens + len(part), None]
                    self.weighted[key] += own.T @ own
                self.tokens += len(part)

    def finish(self) -> Statistics:
        """The sums so far, on the CPU, with an exactly symmetric Gram.

        Raises:
            NumericalError: if an activation was NaN or Inf, or its square overflowed.
        """
        # A single NaN or Inf survives every sum, so one check at the end is enough and avoids synchronisation before.
        channels = ~(self.abs_sum.isfinite() & self.gram.diagonal().isfinite())
        if bool(channels.any()):
            first = int(channels.nonzero()[0])
            raise NumericalError(
                f"{self.name}: NaN or Inf in {int(channels.sum())} of {len(channels)} input channels (first: {first}); "
                "the model overflows on this text (try bfloat16 or float32 weights) or is damaged"
            )
        loss = {key: LossGram(_symmetric(gram), self.weights[key].energy) for key, gram in self.weighted.items()}
        return Statistics(_symmetric(self.gram), self.abs_sum.cpu(), self.tokens, loss)


def _symmetric(gram: Tensor) -> Tensor:
    """The upper triangle of a matrix (d, d) on both sides, on the CPU."""
    gram = gram.cpu()
    for start in range(0, len(gram), 1024):  # in blocks, to avoid a second full copy
        stop = start + 1024
        corner = gram[start:stop, start:stop].triu()
        gram[start:stop, start:stop] = corner + corner.triu(1).T
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def accumulate(x: Tensor, mask: Tensor | None = None, *, name: str = "activations") -> Statistics:
    """Statistics of one batch.

    Args:
        x: (..., d).
        mask: (...), true (or 1) at real tokens; padding is ignored. None: all tokens are real.
        name: of the layer, for messages.

    Raises:
        NumericalError: if a real token has NaN or Inf.
    """
    accumulator = Accumulator(name, x.shape[-1], x.device)
    accumulator.add(x, mask)
    return accumulator.finish()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in full float32, without TF32 or bfloat16, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
