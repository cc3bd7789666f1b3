"""Documents into blocks of tokens, reproducibly."""

import hashlib
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cospadi.aliases import canonical_bos
from cospadi.calibration.begin import begin_ids, begin_text
from cospadi.calibration.texts import Texts, TextSource, read_texts, rendered
from cospadi.errors import CalibrationError
from cospadi.progress import PhaseProgress

_CHUNK_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens of equal length.

    Attributes:
        ids: int64 (blocks, seq_len).
        sha256: of the ids and their shape.
        report: documents, tokens_available, tokens_used, longest_document (tokens), truncated_tokens (the
            stream's tail, which does not fill a block), samples_asked, samples_used, seq_len, seed, source, notes,
            bos (the option), begins_with (the tokens before the text of every block; empty if none), fields (that the
            text was read from), chat_template (digest of the one that conversations were rendered through; empty if
            there were none).
    """

    ids: Tensor
    sha256: str
    report: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def facts(self) -> dict[str, Any] | None:
        """What a run's report says of them; None if there are none."""
        return self.report | {"sha256": self.sha256} if len(self) else None

    @classmethod
    def none(cls) -> Self:
        """No blocks, of a run without calibration text."""
        return cls(torch.zeros(0, 0, dtype=torch.int64), "")


def encode(texts: Texts, tokenizer: PreTrainedTokenizerBase, progress: PhaseProgress | None = None) -> list[np.ndarray]:
    """Token ids of every document, int32, without added special tokens.

    Args:
        texts: the documents.
        tokenizer: of the model.
        progress: called as progress(documents done, documents, source of the text).
    """
    out: list[np.ndarray] = []
    batch: list[str] = []
    waiting = 0
    for number, document in enumerate(texts.plain, 1):
        batch.append(document)
        waiting += len(document)
        if waiting >= _CHUNK_CHARACTERS or number == len(texts):
            # verbose=False: a document may be longer than the model's context
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            out.extend(np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"])
            batch, waiting = [], 0
            if progress:
                progress(number, len(texts), texts.source)
    return out


def join(documents: list[np.ndarray], end: int | None) -> np.ndarray:
    """One stream of token ids, int64, with the end token (if any) between documents."""
    parts: list[np.ndarray] = []
    for ids in documents:
        if parts and end is not None:
            parts.append(np.asarray([end], dtype=np.int32))
        parts.append(ids)
    return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class Cut:
    """A text as one stream of tokens, to be cut into blocks that do not overlap.

    Every block begins with the BOS where the tokenizer adds one, in place of a token of text; so much less text is in
    it, and none of it is lost.

    Attributes:
        texts: the documents that were encoded.
        documents: their token ids, int32.
        end: the end token between them, if any.
        stream: int64 (tokens,), without the BOS.
        begin: what stands before the text of every block.
        begins_with: the same as text.
        seq_len: tokens per block, `begin` among them.
        template: digest of the chat template that conversations were rendered through; empty without any.
    """

    texts: Texts
    documents: list[np.ndarray]
    end: int | None
    stream: np.ndarray
    begin: tuple[int, ...]
    begins_with: str
    seq_len: int
    template: str

    @property
    def step(self) -> int:
        """Tokens of text per block."""
        return self.seq_len - len(self.begin)

    @property
    def available(self) -> int:
        """Whole blocks; at least one."""
        return len(self.stream) // self.step

    def blocks(self, chosen: np.ndarray | range) -> np.ndarray:
        """Token ids, int64 (chosen, seq_len), of the blocks with these indices."""
        text = self.stream[: self.available * self.step].reshape(self.available, self.step)[np.asarray(chosen)]
        begin = np.tile(np.asarray(self.begin, dtype=np.int64), (len(text), 1))
        return np.ascontiguousarray(np.concatenate([begin, text], axis=1))


def cut(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    bos: str = "auto",
    progress: PhaseProgress | None = None,
) -> Cut:
    """Encode a text for blocks of `seq_len` tokens.

    Conversations are rendered through the model's chat template. Documents are joined by the end token. One that begins
    with the BOS itself loses it where blocks begin with it.

    Args:
        texts: the documents.
        tokenizer: of the model.
        seq_len: tokens per block.
        bos: whether blocks begin with the BOS, see :func:`~cospadi.calibration.begin.begin_ids`.
        progress: called as progress(documents done, documents, source of the text).

    Raises:
        CalibrationError: if the text does not fill a single block, or has conversations and the model no template.
        RecipeError: if `bos` is unknown.
    """
    begin = begin_ids(tokenizer, bos)
    written = begin_text(tokenizer, begin)
    texts, template = rendered(texts, tokenizer)
    if written:
        texts = replace(texts, documents=tuple(text.removeprefix(written) for text in texts.plain))
    documents = encode(texts, tokenizer, progress)
    end = tokenizer.eos_token_id
    found = Cut(texts, documents, end, join(documents, end), begin, written, seq_len, template)
    if found.step < 1 or found.available < 1:
        raise CalibrationError(
            f"{texts.source}: its {len(found.stream)} tokens do not fill one sequence of {seq_len}; "
            "use more text or a smaller --seq-len"
        )
    return found


def token_blocks(
    texts: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    seq_len: int = 1024,
    seed: int = 0,
    bos: str = "auto",
    progress: PhaseProgress | None = None,
) -> TokenBlocks:
    """Draw calibration blocks.

    The documents are joined by the end token into one stream, which is cut into non-overlapping blocks. `samples`
    blocks are drawn without replacement and kept in the order of the text.

    Args:
        texts: documents, or anything `read_texts` accepts.
        tokenizer: of the model.
        samples: number of blocks.
        seq_len: tokens per block.
        seed: of the draw.
        bos: whether blocks begin with the BOS: ``"auto"`` (where the tokenizer adds it), ``"on"`` or ``"off"``.
        progress: called as progress(documents done, documents, source of the text).

    Returns:
        the blocks; if there are fewer than requested, all of them, with a warning.

    Raises:
        CalibrationError: if the text does not fill a single block.
        RecipeError: if `bos` is unknown.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"samples and seq_len must be positive, not {samples} and {seq_len}")
    texts = read_texts(texts)
    notes = list(texts.notes)
    found = cut(texts, tokenizer, seq_len, bos, progress)
    if found.end is None and len(found.documents) > 1:
        notes.append("the tokenizer has no end token: documents are joined without a separator")
    available = found.available
    if available < samples:
        notes.append(
            f"the text has only {available} of the {samples} requested sequences of {seq_len} tokens; all are used"
        )
        warnings.warn(f"{texts.source}: {notes[-1]}", stacklevel=2)
    chosen = np.sort(np.random.default_rng(seed).permutation(available)[:samples])
    ids = found.blocks(chosen)
    report = {
        "source": texts.source,
        "documents": len(found.documents),
        "tokens_available": len(found.stream),
        "tokens_used": int(ids.size),
        "longest_document": max(map(len, found.documents)),
        "truncated_tokens": len(found.stream) - available * found.step,
        "samples_asked": samples,
        "samples_used": len(chosen),
        "seq_len": seq_len,
        "seed": seed,
        "bos": canonical_bos(bos),
        "begins_with": found.begins_with,
        "fields": list(texts.fields),
        "chat_template": found.template,
        "notes": notes,
    }
    return TokenBlocks(torch.from_numpy(ids), digest(ids), report)


def digest(ids: np.ndarray) -> str:
    """SHA-256 of a matrix of token ids: its shape, then the ids, all as little-endian 64-bit integers."""
    shape = np.asarray(ids.shape, dtype="<i8").tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()
