"""How long a sequence may be: a table of learned positions ends, rotary positions only leave what was trained."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from cospadi.errors import CalibrationError

_SPARE_ROWS = 8
"""Rows that a table of positions may have beyond the positions (OPT: two, for padding)."""


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Look whether a model can read sequences of some length.

    Beyond its positions a model with computed ones (rotary, ALiBi) still runs, worse than on any text it was trained
    for: a warning. A model that learned a vector for every position has none for the others: an error.

    Args:
        model: real or on ``meta``.
        seq_len: tokens in a sequence.

    Raises:
        CalibrationError: if the positions are learned and too few.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1 or seq_len <= positions:
        return
    if _learned(model, positions):
        raise CalibrationError(
            f"sequences of {seq_len} tokens are too long for this model, which learned {positions} positions: "
            f"use --seq-len {positions} or less"
        )
    warnings.warn(
        f"sequences of {seq_len} tokens are longer than the {positions} positions that the model was made for, its "
        f"figures on them may be poor: --seq-len {positions} avoids that",
        stacklevel=2,
    )


def _learned(model: PreTrainedModel, positions: int) -> bool:
    """Whether there is a table with a row for every position, beside that of the tokens."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and positions <= module.num_embeddings <= positions + _SPARE_ROWS
        for module in model.modules()
    )
