"""What pruning methods may ask about a model and its calibration text, computed on demand and only once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration import sequences_per_batch
from cospadi.errors import CalibrationError
from cospadi.model_view import LayerReplay, ModelView
from cospadi.progress import Progress, silent
from cospadi.pruning.depth.distances import PairDistances, pair_distances

BATCH_TOKENS = 4096
REMEDY = "use fewer --samples or a smaller --seq-len, or --device cpu"


@dataclass(frozen=True)
class Tokens:
    """Calibration text.

    Sequences may be padded on the right. Under a causal mask, padding does not change the hidden states of the tokens
    before it, so it only has to be kept out of the statistics; `lengths` says where it starts.

    Attributes:
        ids: int64 (sequences, length); (0, 0) where there is no text.
        lengths: int64 (sequences,), number of real tokens of each sequence; None: all tokens are real.

    Raises:
        CalibrationError: if there are no tokens, or the lengths do not fit the ids.
    """

    ids: Tensor
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or (not self.ids.numel() and any(self.ids.shape)):
            raise CalibrationError(f"calibration needs token ids (sequences, length), not {tuple(self.ids.shape)}")
        if self.lengths is not None and (
            self.lengths.shape != self.ids.shape[:1]
            or int(self.lengths.min()) < 1
            or int(self.lengths.max()) > self.ids.shape[1]
        ):
            raise CalibrationError("the lengths of calibration sequences must lie between 1 and their width")

    @property
    def count(self) -> int:
        """Number of real tokens."""
        return int(self.ids.numel() if self.lengths is None else self.lengths.sum())

    def first(self, sequences: int) -> Tokens:
        """The first sequences."""
        return Tokens(self.ids[:sequences], None if self.lengths is None else self.lengths[:sequences])

    def parted(self, every: int) -> tuple[Tokens, Tokens]:
        """Split the text for fitting and validation: one sequence in `every` (at least one) is held out.

        Args:
            every: distance between held-out sequences.

        Returns:
            the text to fit on, and the held-out text; both are the whole text if it has a single sequence.
        """
        if len(self.ids) == 1:
            return self, self
        held = torch.arange(1, len(self.ids) + 1) % every == 0
        held[-1] |= not bool(held.any())
        parts = [Tokens(self.ids[part], None if self.lengths is None else self.lengths[part]) for part in (~held, held)]
        return parts[0], parts[1]

    def batches(self, sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of ids (b, length), with a mask (b, length) of the real tokens; at most `sequences` in each."""
        length = self.ids.shape[1]
        lengths = torch.full((len(self.ids),), length) if self.lengths is None else self.lengths
        for ids, real in zip(torch.split(self.ids, sequences), torch.split(lengths, sequences), strict=True):
            yield ids, torch.arange(length)[None] < real[:, None]


@dataclass
class Evidence:
    """A model, its calibration text, and statistics that several methods or sizes share.

    The model is only read. Statistics are computed in the dtype that the model has when they are first requested.

    Attributes:
        view: of the model.
        tokens: calibration text.
        device: where layers run.
        seed: for every random choice.
        progress: called as progress(phase, done, total, detail, error).
        memo: results that a method keeps for its next size, under its own name.
        spent: when the distances were started, and the seconds that they took.
    """

    view: ModelView
    tokens: Tokens
    device: torch.device | str = "cpu"
    seed: int = 0
    progress: Progress = silent
    memo: dict[str, Any] = field(default_factory=dict)
    spent: tuple[float, float] = (0.0, 0.0)

    @cached_property
    def pairs(self) -> PairDistances:
        """Distances between the hidden states of all pairs of depths."""
        begun = time.perf_counter()
        with self.walk(self.tokens, "distances") as batches:
            found = pair_distances(batches, len(self.view.layers) + 1)
        self.spent = begun, time.perf_counter() - begun
        return found

    def seconds_since(self, moment: float) -> float:
        """Seconds that the distances took, if they were started after a moment of ``time.perf_counter``; else 0."""
        begun, seconds = self.spent
        return seconds if begun >= moment else 0.0

    @contextmanager
    def walk(self, tokens: Tokens, phase: str) -> Iterator[Iterator[tuple[list[Tensor], Tensor]]]:
        """Hidden states at every depth, batch by batch.

        Args:
            tokens: the text to run.
            phase: name of the work, for progress.

        Yields:
            an iterator over batches: the inputs of all blocks followed by the output of the last block, each
            (b, length, width) on `device`; and the mask of real tokens (b, length).
        """
        with LayerReplay(self.view, self.device) as replay:
            yield self._walk(replay, tokens, phase)

    def _walk(self, replay: LayerReplay, tokens: Tokens, phase: str) -> Iterator[tuple[list[Tensor], Tensor]]:
        for ids, mask in self.batched(tokens, phase):
            states = [replay.embed(ids)]
            for index in range(len(self.view.layers)):
                states.append(replay.layer(index, states[-1]))
            yield states, mask.to(replay.device)

    def batched(self, tokens: Tokens, phase: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a few thousand tokens, reporting progress."""
        size = sequences_per_batch(tokens.ids.shape[1], BATCH_TOKENS)
        total = -(-len(tokens.ids) // size)
        self.progress("calibrate", 0, total, phase)
        for done, batch in enumerate(tokens.batches(size), 1):
            yield batch
            self.progress("calibrate", done, total, phase)
