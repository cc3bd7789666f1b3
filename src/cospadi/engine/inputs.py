"""Where a run gets its model, its calibration text and its statistics."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import (
    ACCEPTED,
    StatisticsStore,
    Texts,
    TextSource,
    TokenBlocks,
    TokenWeights,
    collect,
    described,
    read_texts,
    token_blocks,
    token_weights,
)
from cospadi.checkpoint import is_compressed
from cospadi.checkpoint.companions import fetch_companions
from cospadi.errors import CalibrationError, ModelError
from cospadi.model_view import InMemory, ModelView, Source, check_ids, check_length, name_of, open_model
from cospadi.progress import Progress
from cospadi.pruning import Evidence, Tokens
from cospadi.recipe import Recipe
from cospadi.runtime.devices import widened
from cospadi.runtime.fingerprints import versions, weights_sha256


def given_text(
    calibration: TextSource | dict[str, Any] | None,
) -> tuple[TextSource | None, str | dict[str, Any] | None]:
    """A calibration text as functions take it.

    Args:
        calibration: whatever :func:`~cospadi.calibration.read_texts` takes: a file, a directory, a hub data set, or
            documents in memory such as a list, a generator or a ``Dataset``; or a whole section ``calibration`` of a
            recipe.

    Returns:
        the documents, where they are in memory; and what the recipe says: a file, directory or hub data set, what the
        documents are, or the section.
    """
    if calibration is None or type(calibration) is dict:
        return None, calibration
    if isinstance(calibration, (str, Path)):
        return None, str(calibration)
    return calibration, described(calibration)


class Inputs:
    """Reads what a run needs, by itself; a comparison lends it instead.

    Args:
        source: of the model: local directory, hub id, or a model in memory, of which the run changes a copy.
        recipe: of the run: calibration text and seed.
        texts: calibration documents in memory, where they are not to be read from the recipe's source.
        progress: called as progress(phase, done, total, detail, error).
    """

    def __init__(self, source: Source, recipe: Recipe, texts: TextSource | None, progress: Progress) -> None:
        self.source, self.recipe, self.texts, self.progress = source, recipe, texts, progress
        self.name = name_of(source)

    @property
    def has_text(self) -> bool:
        """Whether there is a calibration text."""
        return self.recipe.calibration.source is not None

    def require_text(self) -> None:
        """Check that the recipe names a calibration text.

        Raises:
            CalibrationError: if it does not.
        """
        if not self.has_text:
            raise CalibrationError(f"no calibration text: name {ACCEPTED}, with --calibration")

    @cached_property
    def documents(self) -> Texts:
        """The calibration text."""
        options = self.recipe.calibration
        return read_texts(self.texts if self.texts is not None else str(options.source), field=options.field)

    def open(self, verb: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The dense model and its tokenizer.

        Args:
            verb: what the run does to it, for messages.

        Raises:
            ModelError: if the model cannot be read, or is compressed already.
            CalibrationError: if the text cannot be read, or the model has no positions for its sequences.
        """
        if self.has_text:
            self.documents  # noqa: B018 - read first: that is quick, and it is where most mistakes are
        given = self.source if isinstance(self.source, InMemory) else None
        if given:
            model, tokenizer = given.model, given.tokenizer
        else:
            model, tokenizer = open_model(str(self.source), warn=False)  # `carried_tensors` tells of them
            fetch_companions(str(model.name_or_path))
        if is_compressed(model.config):
            raise ModelError(f"{self.source} is already compressed by cospadi: {verb} the dense model instead")
        if self.has_text:
            check_length(model, self.recipe.calibration.seq_len)
        return (given.copied() if given else model), tokenizer

    def tokens(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
        """The calibration text in blocks of tokens; no blocks if there is none.

        Raises:
            CalibrationError: if the text does not fill a block.
            ModelError: if the model has no embedding for one of its tokens.
        """
        if not self.has_text:
            return TokenBlocks.none()
        options = self.recipe.calibration
        blocks = token_blocks(
            self.documents,
            tokenizer,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=self.recipe.seed,
            bos=options.bos,
        )
        check_ids(model, tokenizer, blocks.ids)
        return blocks

    def token_weights(
        self, view: ModelView, blocks: TokenBlocks, device: torch.device, folder: Path, *, whole: bool
    ) -> TokenWeights:
        """How much the loss minds errors at every token, computed where that is missing.

        Args:
            view: of the model.
            blocks: the calibration text.
            device: where layers run.
            folder: of the statistics.
            whole: whether the model is the one that was read, and not one that was pruned first.
        """
        reporting, seed = partial(self.progress, "calibrate"), self.recipe.seed
        with widened(view.model, device):
            return token_weights(view, blocks.ids, folder / "gradients", seed=seed, device=device, progress=reporting)

    def statistics(
        self,
        view: ModelView,
        blocks: TokenBlocks,
        device: torch.device,
        folder: Path,
        *,
        whole: bool,
        weights: TokenWeights | None = None,
    ) -> StatisticsStore:
        """The statistics of every group's input, collected where they are missing; none without a text.

        Args:
            view: of the model.
            blocks: the calibration text.
            device: where layers run.
            folder: where they are kept.
            whole: whether the model is the one that was read, and not one that was pruned first.
            weights: of the tokens, where loss-weighted Grams are wanted, too.
        """
        store = StatisticsStore(folder, {"tokens": blocks.sha256, "model": self.name})
        if not len(blocks):
            return store
        with widened(view.model, device):
            reporting = partial(self.progress, "calibrate")
            collect(view, blocks.ids, device=device, store=store, weights=weights, progress=reporting)
        return store

    def evidence(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> Evidence:
        """What pruning methods may ask of the model and the text."""
        return Evidence(view, Tokens(blocks.ids), device, self.recipe.seed, self.progress)

    def fingerprint(
        self, model: PreTrainedModel, blocks: TokenBlocks, device: torch.device, recipe: Recipe
    ) -> dict[str, Any]:
        """What a run is: model, recipe, text, device, versions.

        The text is known by its tokens; where its file lies and how it is read do not matter, nor how the device was
        named.
        """
        settings = recipe.model_dump(mode="json")
        for key in ("source", "field", "bos"):
            settings["calibration"].pop(key)
        settings.pop("device")
        found = versions()
        return {
            "model": {"name": self.name, "sha256": weights_sha256(model)},
            "recipe": settings,
            "text": {"tokens_sha256": blocks.sha256},
            "device": device.type,
            "versions": {"cospadi": found["cospadi"], "torch": found["torch"]},
        }
