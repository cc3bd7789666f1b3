"""Sensitivity: how far the model's predictions move when one group alone is replaced, for many groups in one pass.

Equal squared errors of two groups' outputs do not cost the model equally: the same relative error costs a hundred times
more in one group than in another, and large errors in early layers cost far more than their square predicts. So the
loss is measured: the Kullback-Leibler divergence of the model's next-token distribution from the original's, with one
group replaced at a time. This needs no labels, and since it compares the same tokens it has little noise: one or two
thousand tokens suffice.

All variants pass through the model together, layer by layer. A layer is moved to the device once, however many variants
there are, and a variant costs nothing before the layer in which it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from cospadi.model_view import LayerReplay, ModelView
from cospadi.runtime.devices import placed
from cospadi.runtime.memory import guard_memory

REMEDY = "use --device cpu, or --allocation uniform"
TOKENS, LENGTH = 2048, 256
"""Tokens on which sensitivity is measured, and their sequence length: many short sequences cover more texts."""


def probe_ids(ids: Tensor, tokens: int = TOKENS, length: int = LENGTH) -> Tensor:
    """The beginnings of the first calibration sequences, about `tokens` tokens together, at least one sequence.

    Args:
        ids: int64 (sequences, length).
        tokens: how many.
        length: most tokens of one sequence; more only where there are too few sequences.
    """
    length = min(int(ids.shape[1]), max(length, -(-tokens // len(ids))))
    return ids[: -(-tokens // length), :length]


class SensitivityMeter:
    """Carries the original and all variants through the decoder layers, first to last.

    Use as a context manager, and call :meth:`layer` for every decoder layer in order, then :meth:`divergences`.

    Args:
        view: of the real model; it is unchanged afterwards.
        ids: int64 (sequences, length), see :func:`probe_ids`.
        device: where layers run.
    """

    def __init__(self, view: ModelView, ids: Tensor, device: torch.device) -> None:
        self.view, self.ids, self.device = view, ids, device
        self.original = torch.empty(0)
        self.variants: list[Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> SensitivityMeter:
        with guard_memory("measuring sensitivity", REMEDY):
            # Small errors drown in the rounding of 16-bit activations.
            self._stack.enter_context(placed(self.view.model, "cpu", torch.float32))
            for part in self.view.outside():
                self._stack.enter_context(placed(part, self.device))
            self.replay = self._stack.enter_context(LayerReplay(self.view, self.device))
            self.original = self.replay.embed(self.ids).cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def layer(
        self, index: int, variants: Sequence[Mapping[str, Tensor]], further: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        """Run one decoder layer on everything.

        Args:
            index: which.
            variants: of this layer: weights that replace some of its own, (d_in, d_out) by module name.
            further: the same for the first of the variants that earlier layers began, which differ in this layer too.
        """
        with guard_memory(f"measuring sensitivity in decoder layer {index}", REMEDY):
            self.replay.fetch(index)
            for number, hidden in enumerate(self.variants):
                with _replaced(self.view, further[number] if number < len(further) else {}, self.device):
                    self.variants[number] = self.replay.layer(index, hidden).cpu()
            for weights in variants:
                with _replaced(self.view, weights, self.device):
                    self.variants.append(self.replay.layer(index, self.original).cpu())
            self.original = self.replay.layer(index, self.original).cpu()

    @torch.no_grad()
    def divergences(self) -> list[float]:
        """Mean KL(original ‖ variant) per token in nats, of every variant in the order in which they were given."""
        totals = [0.0] * len(self.variants)
        with guard_memory("comparing predictions", REMEDY):
            self.replay.release()
            for at in range(len(self.ids)):  # one sequence at a time: vocabularies are large
                expected = self._log_probabilities(self.original, at)
                for number, hidden in enumerate(self.variants):
                    found = self._log_probabilities(hidden, at)
                    totals[number] += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        return [max(total, 0.0) / self.ids.numel() for total in totals]

    def _log_probabilities(self, hidden: Tensor, at: int) -> Tensor:
        logits = self.replay.logits(self.ids[at : at + 1], hidden[at : at + 1].to(self.device))
        return logits.float().log_softmax(-1)


@contextmanager
def _replaced(view: ModelView, weights: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """Lend other weights to some modules."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, weight in weights.items():
            parameter = view.module(name).weight
            assert isinstance(parameter, Tensor)
            kept.append((parameter, parameter.data))
            parameter.data = weight.T.to(device, parameter.dtype).contiguous()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
