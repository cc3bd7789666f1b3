"""Where a run gets its model, its calibration text and its statistics."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import StatisticsStore, Texts, TokenBlocks, collect, read_texts, token_blocks
from cospadi.checkpoint import is_compressed
from cospadi.checkpoint.companions import fetch_companions
from cospadi.errors import CalibrationError, ModelError
from cospadi.model_view import ModelView, check_length, model_name, open_model
from cospadi.progress import Progress
from cospadi.pruning import Evidence, Tokens
from cospadi.recipe import Recipe
from cospadi.runtime.devices import widened
from cospadi.runtime.fingerprints import versions, weights_sha256


class Inputs:
    """Reads what a run needs, by itself; a comparison lends it instead.

    Args:
        source: of the model: local directory or hub id.
        recipe: of the run: calibration text and seed.
        texts: calibration documents, where they are not to be read from the recipe's source.
        progress: called as progress(phase, done, total, detail, error).
    """

    def __init__(self, source: str, recipe: Recipe, texts: list[str] | None, progress: Progress) -> None:
        self.source, self.recipe, self.texts, self.progress = source, recipe, texts, progress
        self.name = model_name(source)

    def require_text(self) -> None:
        """Check that the recipe names a calibration text.

        Raises:
            CalibrationError: if it does not.
        """
        if self.recipe.calibration.source is None:
            raise CalibrationError(
                "no calibration text: name a .txt, .json, .jsonl or .parquet file, or a hub dataset, with --calibration"
            )

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
        self.documents  # noqa: B018 - read first: that is quick, and it is where most mistakes are
        model, tokenizer = open_model(self.source, warn=False)  # `carried_tensors` tells of them
        fetch_companions(str(model.name_or_path))
        if is_compressed(model.config):
            raise ModelError(f"{self.source} is already compressed by cospadi: {verb} the dense model instead")
        check_length(model, self.recipe.calibration.seq_len)
        return model, tokenizer

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
        """The calibration text in blocks of tokens."""
        options = self.recipe.calibration
        return token_blocks(
            self.documents, tokenizer, samples=options.samples, seq_len=options.seq_len, seed=self.recipe.seed
        )

    def statistics(
        self, view: ModelView, blocks: TokenBlocks, device: torch.device, folder: Path, *, whole: bool
    ) -> StatisticsStore:
        """The statistics of every group's input, collected where they are missing.

        Args:
            view: of the model.
            blocks: the calibration text.
            device: where layers run.
            folder: where they are kept.
            whole: whether the model is the one that was read, and not one that was pruned first.
        """
        store = StatisticsStore(folder, {"tokens": blocks.sha256, "model": self.name})
        with widened(view.model, device):
            collect(view, blocks.ids, device=device, store=store, progress=partial(self.progress, "calibrate"))
        return store

    def evidence(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> Evidence:
        """What pruning methods may ask of the model and the text."""
        return Evidence(view, Tokens(blocks.ids), device, self.recipe.seed, self.progress)

    def fingerprint(
        self, model: PreTrainedModel, blocks: TokenBlocks, device: torch.device, recipe: Recipe
    ) -> dict[str, Any]:
        """What a run is: model, recipe, text, device, versions.

        The text is known by its tokens; where its file lies does not matter, nor how the device was named.
        """
        settings = recipe.model_dump(mode="json")
        settings["calibration"].pop("source")
        settings.pop("device")
        found = versions()
        return {
            "model": {"name": self.name, "sha256": weights_sha256(model)},
            "recipe": settings,
            "text": {"tokens_sha256": blocks.sha256},
            "device": device.type,
            "versions": {"cospadi": found["cospadi"], "torch": found["torch"]},
        }
