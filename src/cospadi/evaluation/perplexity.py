"""Perplexity of a causal language model on a text.

Per token, on the text as one stream of tokens (documents are joined by the end token), cut into non-overlapping blocks.
The last partial block is dropped, and the first token of each block is not predicted. Where the tokenizer adds a BOS,
every block begins with it in place of one token of text; then neither it nor the first token of text is predicted, so
that every predicted token has text before it either way.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration.blocks import Cut, cut
from cospadi.calibration.texts import TextSource, read_texts
from cospadi.errors import CalibrationError, NumericalError
from cospadi.model_view import check_ids, check_length, embedding_weight, where_not_finite
from cospadi.progress import PhaseProgress
from cospadi.runtime.devices import placed
from cospadi.runtime.memory import guard_memory

LOGITS_AT_A_TIME = 2**26
LOSS_AT_A_TIME = 2**24
REMEDY = "use a smaller --seq-len or --batch, or --device cpu"


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        tokens: predicted tokens.
        blocks: number of blocks evaluated.
        bits_per_byte: total loss in bits, divided by the UTF-8 bytes of the text the blocks cover.
        word_perplexity: exp of the total loss divided by the number of whitespace-separated words of that text.
        begins_with: what every block begins with besides the text, such as ``<bos>``; empty if nothing.
    """

    perplexity: float
    tokens: int
    blocks: int
    bits_per_byte: float
    word_perplexity: float
    begins_with: str = ""


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    seq_len: int = 1024,
    max_blocks: int | None = None,
    device: torch.device | str = "cpu",
    batch: int | None = None,
    bos: str = "auto",
    progress: PhaseProgress | None = None,
) -> Perplexity:
    """Measure the perplexity of any causal language model, compressed or not.

    Args:
        model: runs on `device` and is moved back afterwards.
        tokenizer: of the model.
        source: anything `read_texts` accepts.
        seq_len: tokens per block, at least 2.
        max_blocks: evaluate at most this many blocks from the start.
        device: where the model runs.
        batch: blocks per batch; None: as many as keep the logits small.
        bos: whether blocks begin with the BOS: ``"auto"`` (where the tokenizer adds it), ``"on"`` or ``"off"``.
        progress: called as progress(blocks done, blocks, source of the text).

    Raises:
        CalibrationError: if the text cannot be read or does not fill a block, or the model has too few positions.
        ModelError: if the model has no embedding for a token of the text.
        NumericalError: if the loss is NaN or Inf.
        RecipeError: if `bos` is unknown.
        ResourceError: if the memory does not suffice.
    """
    if seq_len < 2:
        raise CalibrationError(f"perplexity needs blocks of at least 2 tokens, not {seq_len}")
    if max_blocks is not None and max_blocks < 1:
        raise CalibrationError(f"max_blocks must be at least 1, not {max_blocks}")
    check_length(model, seq_len)
    texts = read_texts(source)
    found = cut(texts, tokenizer, seq_len, bos)
    if found.step < 2:
        raise CalibrationError(
            f"perplexity needs blocks of at least 2 tokens after {found.begins_with}, not {found.step}"
        )
    count = min(found.available, max_blocks or found.available)
    blocks = torch.from_numpy(found.blocks(range(count)))
    check_ids(model, tokenizer, blocks)
    total = 0.0
    training = model.training
    model.train(False)
    try:
        with guard_memory("computing perplexity", REMEDY), placed(model, device), torch.no_grad():
            size = batch or max(1, LOGITS_AT_A_TIME // (seq_len * len(embedding_weight(model))))
            for done, part in enumerate(torch.split(blocks, size)):
                total += _loss(model, part.to(device), len(found.begin))
                if progress:
                    progress(min((done + 1) * size, count), count, texts.source)
    finally:
        model.train(training)
    tokens = count * (found.step - 1)
    if not math.isfinite(total):
        raise NumericalError(
            f"the loss on {texts.source} is {total}: the model outputs NaN or Inf{where_not_finite(model)}"
        )
    covered = list(_covered(found, tokenizer, count * found.step))
    size_in_bytes = sum(len(text.encode()) for text in covered)
    words = sum(len(text.split()) for text in covered)
    return Perplexity(
        perplexity=_exp(total / tokens),
        tokens=tokens,
        blocks=count,
        bits_per_byte=total / math.log(2) / max(size_in_bytes, 1),
        word_perplexity=_exp(total / max(words, 1)),
        begins_with=found.begins_with,
    )


def _loss(model: PreTrainedModel, ids: Tensor, begin: int) -> float:
    """Summed negative log-likelihood of a batch of blocks (batch, length), without each block's first token of text.

    That comes after `begin` tokens, which are not predicted either.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, begin:-1].flatten(0, 1)
    targets = ids[:, begin + 1 :].flatten()
    rows = max(1, LOSS_AT_A_TIME // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        chosen = wide.gather(1, target[:, None]).squeeze(1)
        total += (wide.logsumexp(1) - chosen).sum(dtype=torch.float64)
    return float(total)


def _covered(found: Cut, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[str]:
    """The text covered by the first `tokens` tokens of the stream, document by document."""
    for text, ids in zip(found.texts.plain, found.documents, strict=True):
        if tokens >= len(ids):
            yield text
        else:
            if tokens > 0:
                yield _prefix(text, tokenizer, ids, tokens)
            return
        tokens -= len(ids) + (found.end is not None)


def _prefix(text: str, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, tokens: int) -> str:
    """The text of the first `tokens` tokens of a document."""
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return text[: offsets["offset_mapping"][tokens - 1][1]]
    return str(tokenizer.decode(ids[:tokens].tolist(), clean_up_tokenization_spaces=False))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
