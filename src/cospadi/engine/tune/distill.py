"""Refinement of all layers together, towards the original model's predictions.

After the last layer, everything that is stored of all groups is tuned by Adam until the compressed model's distribution
of the next token is that of the original model on the calibration text (Kullback-Leibler; no labels). A layer alone
can only make up for its own errors; here they may cancel each other, and only what reaches the predictions counts.
Masks stay, integers are rounded straight-through, and sequences that are never trained on decide, as in `refine`.

The original model need not be kept: its last layer's output on the text is enough, since norm and head are not
compressed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from cospadi.engine.tune.tunable import Knob, TunableGroup
from cospadi.engine.tune.tuner import Schedule, Tuner, split_sequences
from cospadi.format import GroupSpec
from cospadi.model_view import LayerReplay, ModelView
from cospadi.progress import Progress
from cospadi.recipe import Refine
from cospadi.runtime.devices import deterministic, placed
from cospadi.runtime.memory import guard_memory

FIRST_RATE = 1e-3
LOGITS = 1 << 27
"""Most numbers of one batch of logits; a step's sequences go through the model in parts."""
REMEDY = "leave out refine.output_steps, or use a smaller --seq-len"


class Predictions:
    """The problem: the original model's next-token distribution.

    Args:
        view: of the model, on the device; its layers hold what is not tuned (norms, biases).
        groups: tunable factors of all groups.
        ids: int64 (sequences, length).
        targets: output of the original model's last decoder layer (sequences, length, width).
        replay: of the model.
    """

    def __init__(
        self, view: ModelView, groups: Sequence[TunableGroup], ids: Tensor, targets: Tensor, replay: LayerReplay
    ) -> None:
        self.view, self.groups, self.ids, self.targets, self.replay = view, groups, ids, targets, replay
        self.knobs: list[Knob] = [k for group in groups for k in group.knobs]
        vocabulary = int(view.model.config.get_text_config().vocab_size)
        self.part = max(1, LOGITS // (ids.shape[1] * vocabulary))

    def weights(self) -> dict[str, Tensor]:
        """Weights by parameter name, as the stored factors compute them, in the model's dtype."""
        out: dict[str, Tensor] = {}
        for group in self.groups:
            for name, weight in zip(group.spec.modules, group.weights(), strict=True):
                out[f"{name}.weight"] = weight.to(self.view.weight(name).dtype)
        return out

    def backward(self, chosen: Tensor) -> None:
        """Gradients of the divergence on some sequences; factors are multiplied out once for all of them."""
        whole = self.weights()
        leaves = {name: weight.detach().requires_grad_(True) for name, weight in whole.items()}
        for part in torch.split(chosen, self.part):
            share = self._divergence(part, leaves) * (len(part) / len(chosen))
            torch.autograd.backward(share, inputs=list(leaves.values()))  # nothing else gets a gradient
        torch.autograd.backward(list(whole.values()), [leaves[name].grad for name in whole])

    def error(self, chosen: Tensor) -> float:
        """Mean divergence per token, in nats."""
        weights = self.weights()
        parts = torch.split(chosen, self.part)
        return sum(float(self._divergence(part, weights)) * len(part) for part in parts) / len(chosen)

    def _divergence(self, chosen: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        device = next(iter(weights.values())).device
        ids = self.ids[chosen].to(device)
        expected = self.replay.logits(ids, self.targets[chosen].to(device)).float().log_softmax(-1)
        arguments = {"input_ids": ids, "use_cache": False}
        found = functional_call(self.view.model, dict(weights), (), arguments, tie_weights=False).logits
        found = found.float().log_softmax(-1)
        divergence: Tensor = (expected.exp() * (expected - found)).sum(-1).mean()
        return divergence


def refine_predictions(
    view: ModelView,
    groups: Sequence[tuple[GroupSpec, dict[str, Tensor]]],
    ids: Tensor,
    targets: Tensor,
    options: Refine,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Tune all groups together.

    Args:
        view: of the real model, whose layers hold the tuned norms and biases; unchanged afterwards.
        groups: specs and packed tensors of all groups.
        ids: the calibration text (sequences, length).
        targets: output of the original model's last decoder layer (sequences, length, width).
        options: steps, batch, share that is held out.
        seed: of the split and of the order of sequences.
        device: where to compute.
        dtype: 16-bit float of the stored tensors.
        progress: called as progress("predictions", steps done, steps, detail, divergence).

    Returns:
        each group's packed tensors in the order given, and numbers for the report.
    """
    begun = time.perf_counter()
    wide = torch.float32 if device.type == "cpu" else None
    with (
        guard_memory("tuning the predictions", REMEDY),
        deterministic(device),
        placed(view.model, device, wide),
        LayerReplay(view, device) as replay,
    ):
        tunable = [TunableGroup(spec, tensors, dtype, device) for spec, tensors in groups]
        problem = Predictions(view, tunable, ids, targets, replay)
        trained, held_out = split_sequences(len(ids), options.held_out, seed)
        schedule = Schedule(options.output_steps, options.batch, options.probe, options.patience, FIRST_RATE)

        def watch(done: int, steps: int, best: float) -> None:
            progress("predictions", done, steps, f"{best:.4f} nats")

        progress("predictions", 0, options.output_steps)
        info = Tuner(problem, trained, held_out, schedule, seed, watch).tune()
        packed = [group.packed() for group in tunable]
    return packed, info | {"seconds": time.perf_counter() - begun}
