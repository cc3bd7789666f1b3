"""One row of a comparison: a run of the engine on what all rows share, measured in memory."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import StatisticsStore, TokenBlocks, TokenWeights, collect, token_weights
from cospadi.checkpoint import load
from cospadi.engine.compress import CompressRun
from cospadi.engine.inputs import Inputs
from cospadi.engine.journal import Journal
from cospadi.engine.outputs import Checkpoint, PrunedCheckpoint
from cospadi.engine.plan.plan import Plan
from cospadi.engine.prune import PruneRun
from cospadi.evaluation.yardstick import Yardstick, peak, reset_peak
from cospadi.model_view import ModelView, Source
from cospadi.progress import Progress
from cospadi.pruning import Evidence, Tokens
from cospadi.recipe import Recipe
from cospadi.runtime.devices import widened

Weights = Callable[[torch.device], dict[str, Tensor]]
"""Weights that stand in for some of a model's own, made on a device when they are needed."""


@dataclass
class Shared:
    """What is read and collected once for all rows.

    Attributes:
        source: of the model.
        model: dense; no row ever changes it.
        tokenizer: of the model.
        view: of the model.
        blocks: the calibration text.
        device: where to work.
        statistics: directory of the cached statistics.
        fingerprint: of these statistics.
        seconds: what the common part took.
        pruning: statistics that pruning methods share; made when they are first asked for.
    """

    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    view: ModelView
    blocks: TokenBlocks
    device: torch.device
    statistics: Path
    fingerprint: dict[str, Any]
    seconds: dict[str, float]
    pruning: Evidence | None = None

    def evidence(self, seed: int, progress: Progress) -> Evidence:
        """Distances between all depths, and whatever else pruning methods keep between rows."""
        if self.pruning is None:
            begun = time.perf_counter()
            self.pruning = Evidence(self.view, Tokens(self.blocks.ids), self.device, seed, progress)
            if len(self.blocks):
                with widened(self.model, self.device):
                    self.pruning.pairs  # noqa: B018 - computed once, here
            self.seconds["distances"] = time.perf_counter() - begun
        self.pruning.progress = progress
        return self.pruning

    def token_weights(self, seed: int, progress: Progress) -> TokenWeights:
        """How much the loss minds errors at every token; computed when it is first asked for."""
        begun, folder, reporting = time.perf_counter(), self.statistics / "gradients", partial(progress, "calibrate")
        with widened(self.model, self.device):
            found = token_weights(self.view, self.blocks.ids, folder, seed=seed, device=self.device, progress=reporting)
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + time.perf_counter() - begun
        return found

    def store(self, progress: Progress, weights: TokenWeights | None = None) -> StatisticsStore:
        """The statistics; collected when they are first asked for, none without a text."""
        begun = time.perf_counter()
        store = StatisticsStore(self.statistics, self.fingerprint)
        if not len(self.blocks):
            return store
        with widened(self.model, self.device):  # as a run by itself does: its rows are the same to the bit
            reporting = partial(progress, "calibrate")
            collect(self.view, self.blocks.ids, device=self.device, store=store, weights=weights, progress=reporting)
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + time.perf_counter() - begun
        return store


class LentInputs(Inputs):
    """Model, tokens and statistics that all rows share.

    A run works on a copy of the model, so whatever it does to the weights, the next row begins with the dense ones, bit
    by bit.

    Args:
        shared: what all rows share.
        recipe: of the row.
        progress: called as progress(phase, done, total, detail, error).
    """

    def __init__(self, shared: Shared, recipe: Recipe, progress: Progress) -> None:
        super().__init__(shared.source, recipe, None, progress)
        self.shared = shared

    def open(self, verb: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A copy of the shared model, whose peak memory counts from here on."""
        reset_peak(self.shared.device)
        return copy.deepcopy(self.shared.model), self.shared.tokenizer

    def tokens(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
        """The shared text."""
        return self.shared.blocks

    def token_weights(
        self, view: ModelView, blocks: TokenBlocks, device: torch.device, folder: Path, *, whole: bool
    ) -> TokenWeights:
        """The shared weights of the tokens, or those of a model that was pruned first."""
        if whole:
            return self.shared.token_weights(self.recipe.seed, self.progress)
        return super().token_weights(view, blocks, device, folder, whole=whole)

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
        """The shared statistics, or those of a model that was pruned first."""
        if whole:
            return self.shared.store(self.progress, weights)
        return super().statistics(view, blocks, device, folder, whole=whole, weights=weights)

    def evidence(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> Evidence:
        """The evidence that all pruning rows share."""
        return self.shared.evidence(self.recipe.seed, self.progress)


class Measured:
    """Measures a model as a row of the comparison does.

    Args:
        shared: what all rows share.
        yardstick: how to measure.
        progress: called as progress(phase, done, total, detail, error).
    """

    def __init__(self, shared: Shared, yardstick: Yardstick, progress: Progress) -> None:
        self.shared, self.yardstick, self.progress = shared, yardstick, progress
        self.peak: dict[str, int] = {}
        self.row: dict[str, Any] = {}

    def made(self, model: PreTrainedModel, weights: Weights | None = None) -> None:
        """A model that was made just now: what making it took is known, too."""
        self.peak = peak(self.shared.device)
        self.stored(model, weights)

    def stored(self, model: PreTrainedModel, weights: Weights | None = None) -> None:
        """A model, or the weights that stand in for some of its own."""
        begun = time.perf_counter()
        self.row = self.yardstick.measure(model, self.shared.tokenizer, self.shared.device, self.progress, weights)
        self.row["evaluate_seconds"] = time.perf_counter() - begun


class RowCheckpoint(Checkpoint):
    """Measures what a run made; writes it only if the comparison keeps its checkpoints.

    Args:
        out: where the checkpoint would lie.
        measured: the measurement.
        keep: whether to write a checkpoint.
    """

    def __init__(self, out: Path, measured: Measured, *, keep: bool) -> None:
        super().__init__(out, measured.progress)
        self.measured, self.keep = measured, keep

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, journal: Journal) -> None:
        """Measure what the journal's groups stand for; write them if the comparison keeps its checkpoints."""
        dtype = self.measured.yardstick.dtype or self.measured.shared.model.dtype
        self.measured.made(model, partial(dense_weights, plan, journal, dtype=dtype))
        if self.keep:
            super().save(model, tokenizer, plan, journal)

    def facts(self) -> dict[str, Any]:
        """Peak memory of the factorisation, and the size of the files, if there are any."""
        return (super().facts() if self.keep else {}) | self.measured.peak


class RowPrunedCheckpoint(PrunedCheckpoint):
    """The same for a run that only prunes."""

    def __init__(self, out: Path, measured: Measured, *, keep: bool) -> None:
        super().__init__(out, measured.progress)
        self.measured, self.keep = measured, keep

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Measure the pruned model; write it if the comparison keeps its checkpoints."""
        self.measured.made(model)
        if self.keep:
            super().save(model, tokenizer)

    def facts(self) -> dict[str, Any]:
        """The size of the files, if there are any."""
        return super().facts() if self.keep else {"file_bytes": None}


def dense_weights(plan: Plan, journal: Journal, device: torch.device, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that a finished run's packed groups stand for, by parameter name, as ``nn.Linear`` holds them."""
    found: dict[str, Tensor] = {}
    for index, group in enumerate(plan.groups):
        packed = {key: tensor.to(device) for key, tensor in journal.groups.read(index)[0].items()}
        weights = group.spec.rebuild(packed)
        found |= {f"{name}.weight": w.T.to(dtype) for name, w in zip(group.spec.modules, weights, strict=True)}
    return found


def _figures(report: dict[str, Any], others: int) -> dict[str, Any]:
    """What every row takes from its run's report; `others` are the bytes that no method touches."""
    return {
        "keep_actual": report["keep_actual"],
        "bytes": report["bytes_after"],
        "bytes_before": report["bytes_before"],
        "total_bytes": report["bytes_after"] + others,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "peak_device_bytes": report.get("peak_device_bytes"),
        "warnings": report["warnings"],
    }


def compressed_row(
    shared: Shared,
    yardstick: Yardstick,
    recipe: Recipe,
    out: Path,
    *,
    keep: bool,
    fresh: bool,
    command: str,
    progress: Progress,
) -> dict[str, Any]:
    """Run one row and return its figures; see :func:`cospadi.evaluation.compare.compare`.

    Args:
        shared: what all rows share.
        yardstick: how to measure.
        recipe: of the row.
        out: where the journal lies and, if `keep`, the checkpoint.
        keep: whether to write a checkpoint.
        fresh: forget an earlier run in `out`.
        command: the command line, for the report.
        progress: called as progress(phase, done, total, detail, error).
    """
    measured = Measured(shared, yardstick, progress)
    outputs = RowCheckpoint(out, measured, keep=keep)
    report = CompressRun(LentInputs(shared, recipe, progress), outputs, recipe, progress, command).go(fresh).report
    if not measured.row:  # the checkpoint was written by an earlier comparison, perhaps with another yardstick
        model: Any = load(out)
        model.dequantize(dtype=yardstick.dtype or model.dtype)
        measured.stored(model)
    seconds = report["seconds"]
    # After an interruption the phase holds what was left to do, the groups' own times hold all of it.
    factorise = max(seconds.get("factorise", 0.0), sum(group["seconds"] for group in report["groups"]))
    energy = sum(group["energy"] for group in report["groups"])
    others = report.get("other_bytes", report["file_bytes_before"] - report["bytes_before"])
    return {
        **_figures(report, others),
        "error": sum(group["missed"] for group in report["groups"]) / energy if energy else 0.0,
        "seconds": factorise + sum(seconds.get(phase, 0.0) for phase in ("prune", "allocate", "refine")),
        **measured.row,
    }


def pruned_row(
    shared: Shared,
    yardstick: Yardstick,
    recipe: Recipe,
    out: Path,
    *,
    keep: bool,
    fresh: bool,
    command: str,
    progress: Progress,
) -> dict[str, Any]:
    """The same for a recipe that only prunes; see :func:`compressed_row`."""
    measured = Measured(shared, yardstick, progress)
    outputs = RowPrunedCheckpoint(out, measured, keep=keep)
    report = PruneRun(LentInputs(shared, recipe, progress), outputs, recipe, progress, command).go(fresh).report
    if not measured.row:
        measured.stored(load(out))
    return {
        **_figures(report, report["other_bytes"]),
        "error": None,
        "seconds": report["seconds"]["prune"],
        "removed": report["prune"]["removed"],
        **measured.peak,
        **measured.row,
    }


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A directory that is gone once what was done in it is done; after an interruption it stays."""
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
