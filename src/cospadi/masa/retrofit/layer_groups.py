"""Which layers share their atoms: consecutive ones whose outputs mean the same words (MASA, arXiv 2508.04581).

The mean hidden state after every decoder layer goes through the model's own final norm and head (the logit lens). Where
the resulting distributions of two consecutive layers are far apart by their Kullback-Leibler divergence, a group ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.errors import CalibrationError, NumericalError, RecipeError
from cospadi.model_view import LayerReplay, ModelView
from cospadi.runtime.memory import guard_memory

LENS_TOKENS = 16_384
"""Tokens of the calibration text that are averaged: a mean needs no more."""
REMEDY = "give a smaller --seq-len, or use --device cpu"


@torch.no_grad()
def logit_lens(view: ModelView, ids: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Log-probabilities of the next word as seen after every decoder layer, from token-averaged hidden states.

    Args:
        view: of a real model.
        ids: int64 (sequences, length); the first sequences up to `LENS_TOKENS` tokens are used.
        device: where the layers run.

    Returns:
        (layers, vocabulary) float64 on the CPU.

    Raises:
        CalibrationError: if there are no tokens.
        NumericalError: if a hidden state is NaN or Inf (names the layer).
    """
    if ids.ndim != 2 or not ids.numel():
        raise CalibrationError(f"the logit lens needs token ids (sequences, length), not {tuple(ids.shape)}")
    ids = ids[: max(1, LENS_TOKENS // ids.shape[1])]
    means = []
    with LayerReplay(view, device) as replay, guard_memory("looking through the logit lens", REMEDY):
        hidden = replay.embed(ids)
        for index in range(len(view.layers)):
            hidden = replay.layer(index, hidden)
            means.append(hidden.double().mean((0, 1)).to(hidden.dtype))
            if not bool(means[-1].isfinite().all()):
                raise NumericalError(f"{view.layers_name}.{index}: its output is NaN or Inf on the calibration text")
        # The layers stand where the tokens of a sequence do: norm and head treat every token by itself.
        stacked = torch.stack(means)[None]
        logits = replay.logits(torch.zeros(1, len(means), dtype=torch.long), stacked)[0]
    return logits.double().log_softmax(-1).cpu()


def divergences(log_probabilities: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p_l ‖ p_{l+1}) of consecutive layers, in nats.

    Args:
        log_probabilities: (layers, vocabulary).

    Returns:
        (layers − 1,) float64, not negative.
    """
    before, after = log_probabilities[:-1].double(), log_probabilities[1:].double()
    return (before.exp() * (before - after)).sum(-1).clamp_min(0)


def group_layers(distances: Tensor, *, groups: int | None = None, threshold: float | None = None) -> list[range]:
    """Cut the layers into consecutive groups where neighbours are furthest apart.

    Args:
        distances: (layers − 1,), of :func:`divergences`.
        groups: how many; the cuts are at the largest distances, of equal ones at the first.
        threshold: instead: a cut wherever the distance is larger.

    Returns:
        the layers of each group, in order.

    Raises:
        RecipeError: if not exactly one of the two is given, or there are more groups than layers.
    """
    layers = len(distances) + 1
    if (groups is None) == (threshold is None):
        raise RecipeError("layers are grouped by their number of groups or by a threshold: give one of the two")
    if groups is not None:
        if not 1 <= groups <= layers:
            raise RecipeError(f"{groups} groups of {layers} layers are not possible: give 1 to {layers}")
        order = sorted(range(layers - 1), key=lambda i: (-float(distances[i]), i))
        cuts = sorted(order[: groups - 1])
    else:
        assert threshold is not None
        cuts = [i for i in range(layers - 1) if float(distances[i]) > threshold]
    begins = [0, *(cut + 1 for cut in cuts)]
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], layers], strict=True)]
