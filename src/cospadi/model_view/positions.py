"""What a model can read: which tokens, and how many (learned positions are a table, computed ones extrapolate)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.errors import CalibrationError, ModelError
from cospadi.model_view.view import embedding_weight

_SPARE_ROWS = 8
"""Additional rows that a table of positions may have (OPT has two, for padding)."""


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor | Sequence[int]) -> None:
    """Check that a model has an embedding for every token, before anything runs.

    Args:
        model: whose embedding counts.
        tokenizer: that made the tokens.
        ids: token ids of any shape.

    Raises:
        ModelError: naming the first token that is beyond the vocabulary.
    """
    size, flat = len(embedding_weight(model)), torch.as_tensor(ids).flatten()
    beyond = flat[flat >= size]
    if len(beyond):
        found = int(beyond[0])
        raise ModelError(
            f"the token {tokenizer.convert_ids_to_tokens(found)!r} has id {found}, but the model's vocabulary has "
            f"{size} tokens: it was added to the tokenizer, and the model was not resized. Use the model's own "
            "tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save the model"
        )


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Check whether a model can process sequences of a length.

    Beyond its maximum length, a model with computed positions (rotary, ALiBi) still runs, but outside its training
    range: a warning. A model with learned positions has no vectors for further ones: an error.

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
            f"sequences of {seq_len} tokens are too long for this model, which has {positions} learned positions: "
            f"use --seq-len {positions} or less"
        )
    warnings.warn(
        f"sequences of {seq_len} tokens are longer than the {positions} positions the model was trained for, so its "
        f"quality may suffer; --seq-len {positions} avoids this",
        stacklevel=2,
    )


def _learned(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model has a table with a row for every position, besides that of the tokens."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and positions <= module.num_embeddings <= positions + _SPARE_ROWS
        for module in model.modules()
    )
