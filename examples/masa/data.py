"""Text to memory-mapped tokens, once: every design and seed then reads the same ones."""

import fcntl
import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cospadi.calibration.begin import begin_ids
from cospadi.calibration.texts import read_texts, rendered
from cospadi.embedded import stdlib_texts
from cospadi.errors import CalibrationError, RecipeError

STDLIB = "stdlib"
"""Name of the default data: the source of the Python standard library, which needs no download."""
DOCUMENTS_AT_A_TIME = 2000
VALIDATION_EVERY = 50
"""Of so many documents the first is held out."""


@dataclass(frozen=True)
class Tokens:
    """One token stream on the disk; documents are joined by the end token.

    Attributes:
        path: the file, raw integers.
        dtype: of the integers.
        count: how many.
        begin: what the tokenizer puts before every text (its BOS), and so before every block.
    """

    path: Path
    dtype: str
    count: int
    begin: tuple[int, ...] = ()

    def blocks(self, length: int) -> np.ndarray:
        """The text of all whole blocks (blocks, length less `begin`), memory-mapped."""
        length -= len(self.begin)
        stream = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))
        whole = self.count // length
        if not whole:
            raise CalibrationError(
                f"{self.path}: {self.count} tokens do not fill one block of {length}; give more text"
            )
        return stream[: whole * length].reshape(whole, length)


def documents(source: str, characters: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Documents of any text that cospadi reads, of a ``.jsonl.xz`` or ``.txt.xz`` file, or of the standard library.

    Args:
        source: path, hub name, or `STDLIB`.
        tokenizer: whose chat template turns conversations into text.
        characters: how much to take of a hub data set.

    Raises:
        CalibrationError: if there is no such text or a line is malformed.
    """
    if source == STDLIB:
        yield from stdlib_texts("train")
        return
    path = Path(source)
    if path.suffix != ".xz":
        yield from rendered(read_texts(source, characters=characters), tokenizer)[0].plain
        return
    inner = Path(path.stem).suffix
    if inner not in (".jsonl", ".txt"):
        raise CalibrationError(f"{source}: only .jsonl.xz and .txt.xz are read compressed")
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            if inner == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                text = record.get("text") if isinstance(record, dict) else record
                if not isinstance(text, str):
                    raise CalibrationError(f"{source}: line {number} has no field 'text'")
                yield text
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise CalibrationError(f"{source}: cannot be read: {error}") from None


def token_lists(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, without special tokens.

    Fast tokenizers do it on all cores, and here without the offsets that nobody reads: twice as fast.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        lists: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return lists
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def prepare(
    source: str, tokenizer: PreTrainedTokenizerBase, folder: Path, *, limit: int, validation: int
) -> tuple[Tokens, Tokens]:
    """Tokenise a text, or find it tokenised in `folder` already.

    Args:
        source: as `documents` takes it.
        tokenizer: its end token joins documents.
        folder: for the token files; made if absent.
        limit: stop after so many training tokens.
        validation: hold out at most so many tokens, of every 50th document.

    Returns:
        training and validation tokens.

    Raises:
        CalibrationError: if the text cannot be read or is too short.
        RecipeError: if `folder` holds the tokens of another text, tokenizer or limit.
    """
    wanted = {
        "source": source,
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
        "limit": limit,
        "validation": validation,
    }
    index, begin = folder / "tokens.json", begin_ids(tokenizer)
    if index.exists():
        found = json.loads(index.read_text())
        if found["wanted"] != wanted:
            raise RecipeError(
                f"{folder}: holds the tokens of {found['wanted']}, not {wanted}; choose another directory"
            )
        train, held = (Tokens(folder / part["path"], part["dtype"], part["count"], begin) for part in found["parts"])
        return train, held
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    names, counts, limits = ("train.bin", "validation.bin"), [0, 0], (limit, validation)
    texts = documents(source, 8 * (limit + validation), tokenizer)
    number = 0
    with (folder / names[0]).open("wb") as train_file, (folder / names[1]).open("wb") as held_file:
        while counts[0] < limit and (some := list(islice(texts, DOCUMENTS_AT_A_TIME))):
            for ids in token_lists(tokenizer, some):
                part = int(number % VALIDATION_EVERY == 0 and counts[1] < validation)
                room = limits[part] - counts[part]
                stream = np.asarray([*ids, tokenizer.eos_token_id][:room], dtype=dtype)
                stream.tofile(held_file if part else train_file)
                counts[part] += len(stream)
                number += 1
    parts = [Tokens(folder / name, dtype, count, begin) for name, count in zip(names, counts, strict=True)]
    stored = [{"path": part.path.name, "dtype": part.dtype, "count": part.count} for part in parts]
    replace_text(index, json.dumps({"wanted": wanted, "parts": stored}, indent=1))
    return parts[0], parts[1]


def replace_text(path: Path, text: str) -> None:
    """Write a file that another process sees either whole or as it was."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    os.replace(unfinished, path)  # noqa: PTH105


@contextmanager
def alone(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock among the processes that share an output directory; it ends with the process.

    Args:
        path: of the lock file, which stays.
        wait: for the other process to end.

    Raises:
        RecipeError: if another process holds it and `wait` is false.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{path.parent}: another process is training this; leave it out of this one") from None
        yield


def begun(text: np.ndarray, begin: tuple[int, ...]) -> torch.Tensor:
    """Blocks of text (blocks, length) with the same tokens before each, int64."""
    before = np.tile(np.asarray(begin, dtype=np.int64), (len(text), 1))
    return torch.from_numpy(np.concatenate([before, text.astype(np.int64)], axis=1))


class Batches:
    """Batches of blocks in a random order that a seed decides; any step can be the first, so that runs resume.

    Args:
        blocks: (blocks, length).
        size: blocks in a batch, of all processes together.
        seed: of the order.
        share: (rank, processes): which blocks of a batch are this process's.
        begin: token ids before the text of every block.
    """

    def __init__(
        self, blocks: np.ndarray, size: int, seed: int, share: tuple[int, int] = (0, 1), begin: tuple[int, ...] = ()
    ) -> None:
        if size > len(blocks):
            raise CalibrationError(f"{len(blocks)} blocks of text do not fill a batch of {size}; give more text")
        self.blocks, self.size, self.seed, self.share, self.begin = blocks, size, seed, share, begin
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> torch.Tensor:
        """The blocks (size / processes, length) of one step, int64."""
        epoch, within = divmod(step, len(self.blocks) // self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
        rank, processes = self.share
        chosen = self._order[within * self.size : (within + 1) * self.size][rank::processes]
        return begun(self.blocks[np.sort(chosen)], self.begin)
