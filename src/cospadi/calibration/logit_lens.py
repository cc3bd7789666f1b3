"""The logit lens: what a model would predict if it ended after each of its decoder layers.

The mean hidden state after every decoder layer goes through the model's own final norm and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.errors import CalibrationError, NumericalError
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
