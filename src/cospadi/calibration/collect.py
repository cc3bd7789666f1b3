"""Collecting the statistics of every linear group's input, one decoder layer at a time."""

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cospadi.calibration.statistics import Accumulator
from cospadi.calibration.store import StatisticsStore
from cospadi.errors import CalibrationError
from cospadi.model_view import LayerReplay, LinearGroup, ModelView
from cospadi.progress import PhaseProgress
from cospadi.runtime.memory import guard_memory

if TYPE_CHECKING:
    from cospadi.calibration.token_weights import TokenWeights

BATCH_TOKENS = 16_384
REMEDY = "give fewer --samples or a smaller --seq-len, or use --device cpu"


def sequences_per_batch(seq_len: int, tokens: int = BATCH_TOKENS) -> int:
    """How many sequences keep one layer's activations within `tokens` tokens; at least one."""
    return max(1, tokens // seq_len)


def collect(
    view: ModelView,
    ids: Tensor,
    *,
    device: torch.device | str = "cpu",
    store: StatisticsStore,
    batch: int | None = None,
    weights: "TokenWeights | None" = None,
    progress: PhaseProgress | None = None,
) -> None:
    """Stream calibration text through the model layer by layer and store one Gram per group's input.

    Layers whose statistics are in the store already are only passed through. At any moment `device` holds one decoder
    layer, one batch of hidden states and the layer's sums.

    Args:
        view: of a real model.
        ids: int64 (sequences, length), without padding.
        device: where the layers run.
        store: where the statistics go, as soon as a layer is done.
        batch: sequences at a time; None: as many as stay within 16k tokens.
        weights: of the tokens; with them, also one loss-weighted Gram for every linear layer.
        progress: called as progress(layers done, layers, name of the layer).

    Warns:
        UserWarning: if there are fewer tokens than inputs of a layer: its Gram is then singular.

    Raises:
        NumericalError: on NaN or Inf in a layer's input (names the layer).
        OutputError: if the statistics cannot be written.
        ResourceError: if the memory does not suffice.
    """
    if ids.ndim != 2 or not len(ids):
        raise CalibrationError(f"calibration needs token ids (sequences, length), not {tuple(ids.shape)}")
    widest = max((group.d_in for group in view.groups), default=0)
    if ids.numel() < widest:  # also where all is in the store: the report of a resumed run shall say it too
        warnings.warn(
            f"{ids.numel()} calibration tokens are fewer than the {widest} inputs of the widest layer: its errors "
            "on other text may be far larger than those reported; give more --samples",
            stacklevel=2,
        )
    layers = range(len(view.layers))

    def done(index: int) -> bool:
        return index in store and (weights is None or store.has_loss(index))

    missing = [index for index in layers if not done(index)]
    if not missing:
        return
    store.require_space((group for group in view.groups if group.layer in set(missing)), loss=weights is not None)
    size = batch or sequences_per_batch(ids.shape[1])
    with LayerReplay(view, device) as replay:
        with guard_memory("embedding the calibration text", REMEDY):
            hidden = [replay.embed(part).cpu() for part in torch.split(ids, size)]
        for index in layers[: missing[-1] + 1]:
            if done(index):
                _advance(replay, index, hidden)
            else:
                _collect_layer(replay, index, hidden, store, weights)
            if progress:
                progress(index + 1, len(layers), f"{view.layers_name}.{index}")


def _advance(replay: LayerReplay, index: int, hidden: list[Tensor]) -> None:
    """Replace every batch by the layer's output."""
    with guard_memory(f"running decoder layer {index}", REMEDY):
        for number, part in enumerate(hidden):
            hidden[number] = replay.layer(index, part).cpu()


def _collect_layer(
    replay: LayerReplay, index: int, hidden: list[Tensor], store: StatisticsStore, weights: "TokenWeights | None"
) -> None:
    groups = replay.view.of_layer(index)
    with guard_memory(f"collecting statistics of decoder layer {index}", REMEDY):
        sums = {
            group: Accumulator(
                group.name, group.d_in, replay.device, weights.of(group.modules) if weights is not None else None
            )
            for group in groups
        }
        with ExitStack() as stack:
            for hook in _hooks(replay.view, sums.items()):
                stack.callback(hook.remove)
            _advance(replay, index, hidden)
        store.save(index, {group: item.finish() for group, item in sums.items()}, loss=weights is not None)


def _hooks(
    view: ModelView, sums: Iterable[tuple[LinearGroup, Accumulator]]
) -> Iterable[torch.utils.hooks.RemovableHandle]:
    for group, accumulator in sums:

        def note(_module: nn.Module, args: tuple[Tensor, ...], _to: Accumulator = accumulator) -> None:
            _to.add(args[0])

        yield view.module(group.modules[0]).register_forward_pre_hook(note)
