"""Two streams of hidden states: of the original model, and of the model whose first layers are compressed.

In the second stream the layers before the current one are compressed, so whatever is fitted to it sees the errors of
those layers and can correct them (the anchored objective, as in AA-SVD).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cospadi.calibration import LossGram, Statistics, TokenWeights, sequences_per_batch
from cospadi.calibration.statistics import CHUNK_TOKENS, Accumulator, full_precision
from cospadi.model_view import LayerReplay, LinearGroup, ModelView
from cospadi.runtime.memory import guard_memory

REMEDY = "use fewer --samples, a smaller --seq-len, or --device cpu"


class _Captured(Exception):
    """Leaves a layer's forward once the input asked for is known."""


class OverriddenReplay(LayerReplay):
    """A replay whose layers can run with other tensors in place of their own."""

    def prepare(self, ids: Tensor) -> None:
        """Learn what layers get beside the hidden states for this shape of tokens, if it is not known yet."""
        if (int(ids.shape[0]), int(ids.shape[1])) not in self._recorded:
            self.embed(ids)

    def layer_with(self, index: int, hidden: Tensor, tensors: Mapping[str, Tensor], *, grad: bool = False) -> Tensor:
        """As `layer`, some parameters replaced.

        Args:
            index: which layer.
            hidden: its input (batch, length, width); the shape must have been prepared.
            tensors: by name within the layer, on `device`.
            grad: record the operations for a backward pass.
        """
        if not tensors:
            return self.layer(index, hidden, grad=grad)
        args, kwargs = self._recorded[(int(hidden.shape[0]), int(hidden.shape[1]))][index]
        with torch.set_grad_enabled(grad):
            out = functional_call(
                self.fetch(index), dict(tensors), (hidden.to(self.device), *args), kwargs, tie_weights=False
            )
        result: Tensor = out if self.view.extra_outputs is None else out[0]
        return result


@dataclass(frozen=True)
class Moments:
    """Second moments of one group's input in both streams, per token, float64.

    Attributes:
        gram: X'ᵀX' (d, d) of the compressed stream.
        cross: X'ᵀX (d, d), X the input in the original stream.
        mean_abs: mean |x'| per channel (d,).
        loss: loss-weighted Grams of the compressed stream, by the name of the layer that reads the input.
    """

    gram: Tensor
    cross: Tensor
    mean_abs: Tensor
    loss: Mapping[str, LossGram] = field(default_factory=dict)


class Streams:
    """Hidden states of both streams before one decoder layer, on the CPU in the model's dtype.

    Args:
        view: of the real model; its layers up to the one at work hold compressed weights, the others their own.
        ids: int64 (sequences, length).
        device: where layers run.
        weights: of the tokens, from the original model; with them, statistics have loss-weighted Grams, too.
    """

    def __init__(self, view: ModelView, ids: Tensor, device: torch.device, weights: TokenWeights | None = None) -> None:
        self.view, self.ids, self.weights = view, ids, weights
        self.replay = OverriddenReplay(view, device)
        self.batch = sequences_per_batch(ids.shape[1])
        with guard_memory("embedding the calibration text", REMEDY):
            self.original = torch.cat([self.replay.embed(part).cpu() for part in torch.split(ids, self.batch)])
        self.compressed = self.original

    @property
    def device(self) -> torch.device:
        """Where layers run."""
        return self.replay.device

    def relative(self, index: int, name: str) -> str:
        """A module's name within its decoder layer."""
        return name.removeprefix(f"{self.view.layers_name}.{index}.")

    def run(self, index: int, hidden: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output (sequences, length, width) for all of a stream, on the CPU."""
        with guard_memory(f"running decoder layer {index}", REMEDY):
            parts = torch.split(hidden, self.batch)
            return torch.cat([self.replay.layer_with(index, part, tensors or {}).cpu() for part in parts])

    def statistics(self, index: int, groups: Sequence[LinearGroup]) -> dict[LinearGroup, Statistics]:
        """Statistics of several inputs of one layer in the compressed stream, from one pass.

        Args:
            index: of the decoder layer, which runs with the weights it holds.
            groups: of that layer.
        """
        sums = {group: self._sums(group) for group in groups}
        with guard_memory(f"collecting statistics of decoder layer {index}", REMEDY), ExitStack() as stack:
            for group, item in sums.items():

                def note(_module: nn.Module, args: tuple[Tensor, ...], _to: Accumulator = item) -> None:
                    _to.add(args[0])

                stack.callback(self.view.module(group.modules[0]).register_forward_pre_hook(note).remove)
            for part in torch.split(self.compressed, self.batch):
                self.replay.layer(index, part)
            return {group: item.finish() for group, item in sums.items()}

    def moments(self, index: int, group: LinearGroup, tensors: Mapping[str, Tensor]) -> Moments:
        """Moments of a group's input.

        Args:
            index: of the decoder layer, whose modules still hold the original weights.
            group: of that layer.
            tensors: compressed weights of groups before this one in the layer, by name within the layer.
        """
        device = self.device
        sums = self._sums(group)
        cross = torch.zeros(group.d_in, group.d_in, dtype=torch.float64, device=device)
        with guard_memory(f"collecting statistics of {group.name}", REMEDY):
            pairs = zip(torch.split(self.original, self.batch), torch.split(self.compressed, self.batch), strict=True)
            for original, compressed in pairs:
                before = self._input(index, group, original, {})
                after = self._input(index, group, compressed, tensors)
                sums.add(after)
                _add_product(cross, after, before)
            found = sums.finish()
        return Moments(found.mean_gram.to(device), cross / found.tokens, found.mean_abs.to(device), found.loss)

    def _sums(self, group: LinearGroup) -> Accumulator:
        weights = None if self.weights is None else self.weights.of(group.modules)
        return Accumulator(group.name, group.d_in, self.device, weights)

    def _input(self, index: int, group: LinearGroup, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What a group reads (batch, length, d_in); the rest of the layer is not run."""
        seen: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Captured

        handle = self.view.module(group.modules[0]).register_forward_pre_hook(note)
        try:
            self.replay.layer_with(index, hidden, tensors)
        except _Captured:
            pass
        finally:
            handle.remove()
        return seen[0]

    def close(self) -> None:
        """Send the layer on `device` home and let go of the hidden states."""
        self.replay.release()
        self.original = self.compressed = torch.empty(0)


@torch.no_grad()
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right of two batches (..., d) to a float64 sum, by float32 products over few tokens."""
    rows = zip(
        torch.split(left.reshape(-1, left.shape[-1]), CHUNK_TOKENS),
        torch.split(right.reshape(-1, right.shape[-1]), CHUNK_TOKENS),
        strict=True,
    )
    with full_precision():
        for a, b in rows:
            wide = torch.float64 if a.dtype == torch.float64 else torch.float32
            total += a.to(wide).T @ b.to(wide)


def anchored_target(weight: Tensor, moments: Moments, *, ridge: float, blend: float) -> Tensor:
    """The weight that brings the compressed stream's input as near as possible to the original output.

    Minimises ‖X W − X' W̃‖² + λ ‖W̃ − W‖², solved by W̃ = W + (G' + λ I)⁻¹ (C − G') W with G' = X'ᵀX', C = X'ᵀX.
    Pulled towards W, not towards zero: directions that the text hardly visits keep what they were.

    Args:
        weight: W (d_in, d_out).
        moments: of its input.
        ridge: λ as a share of the mean diagonal of G'.
        blend: share of the correction that is applied, 0 to 1.

    Returns:
        W̃ (d_in, d_out) float64.
    """
    weight = weight.double()
    gram = moments.gram
    penalty = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return weight + blend * torch.cholesky_solve((moments.cross - gram) @ weight, factor)


def anchored_error(weight: Tensor, approximation: Tensor, moments: Moments, energy: float) -> float:
    """‖X W − X' Ŵ‖² / ‖X W‖².

    Args:
        weight: W (d_in, d_out).
        approximation: Ŵ (d_in, d_out).
        moments: of the input in both streams.
        energy: ‖X W‖² per token.
    """
    weight, approximation = weight.double(), approximation.double()
    mixed = (approximation * (moments.cross @ weight)).sum()
    own = (approximation * (moments.gram @ approximation)).sum()
    return float(energy - 2 * mixed + own) / energy if energy else 0.0
