"""One row of a comparison: a run of the engine on what all rows share, measured in memory."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import StatisticsStore, Texts, TokenBlocks, collect
from cospadi.checkpoint import load
from cospadi.engine.factorise import rebuild
from cospadi.engine.journal import Journal
from cospadi.engine.plan.plan import Plan
from cospadi.engine.plan.shared import shared_weights
from cospadi.engine.prune import PruneRun
from cospadi.engine.run import Run
from cospadi.evaluation.yardstick import Yardstick, peak, reset_peak
from cospadi.model_view import ModelView
from cospadi.pruning import Evidence, Tokens
from cospadi.recipe import Recipe
from cospadi.runtime.devices import device_name, widened
from cospadi.runtime.fingerprints import versions

Progress = Callable[..., None]


@dataclass
class Shared:
    """What is read and collected once for all rows.

    Attributes:
        source: name of the model.
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

    source: str
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
            with widened(self.model, self.device):
                self.pruning.pairs  # noqa: B018 - computed once, here
            self.seconds["distances"] = time.perf_counter() - begun
        self.pruning.progress = progress
        return self.pruning

    def store(self, progress: Progress) -> StatisticsStore:
        """The statistics; collected when they are first asked for."""
        begun = time.perf_counter()
        store = StatisticsStore(self.statistics, self.fingerprint)
        with widened(self.model, self.device):  # as a run by itself does: its rows are the same to the bit
            collect(
                self.view, self.blocks.ids, device=self.device, store=store, progress=partial(progress, "calibrate")
            )
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + time.perf_counter() - begun
        return store


class RowRun(Run):
    """A run whose model, tokens and statistics are lent, and whose result is measured before (or without) saving.

    It works on a copy of the model, so whatever the engine does to its weights, the next row begins with the dense
    ones, bit by bit.

    Args:
        shared: what all rows share.
        yardstick: how to measure.
        recipe: of the row.
        out: where the journal lies and, if `save`, the checkpoint.
        save: whether to write a checkpoint.
        progress: called as progress(phase, done, total, detail, error).
        command: for the report.
    """

    def __init__(
        self,
        shared: Shared,
        yardstick: Yardstick,
        recipe: Recipe,
        out: Path,
        *,
        save: bool,
        progress: Progress,
        command: str,
    ) -> None:
        super().__init__(shared.source, out, recipe, None, progress, command)
        self.shared, self.yardstick, self.write = shared, yardstick, save
        self.documents = Texts((), str(recipe.calibration.source))
        self.row: dict[str, Any] = {}

    def measured(self, fresh: bool) -> dict[str, Any]:
        """Run, and give the figures of the row; see :func:`cospadi.evaluation.compare.compare`."""
        report = self.go(fresh).report
        if not self.row:  # the checkpoint was written by an earlier comparison, perhaps with another yardstick
            self.row = self._stored()
        seconds = report["seconds"]
        # After an interruption the phase holds what was left to do, the groups' own times hold all of it.
        factorise = max(seconds.get("factorise", 0.0), sum(group["seconds"] for group in report["groups"]))
        energy = sum(group["energy"] for group in report["groups"])
        return {
            "keep_actual": report["keep_actual"],
            "bytes": report["bytes_after"],
            "bytes_before": report["bytes_before"],
            "total_bytes": report["bytes_after"]
            + report.get("other_bytes", report["file_bytes_before"] - report["bytes_before"]),
            "error": sum(group["missed"] for group in report["groups"]) / energy if energy else 0.0,
            "seconds": factorise + sum(seconds.get(phase, 0.0) for phase in ("prune", "allocate", "refine")),
            "peak_memory_bytes": report["peak_memory_bytes"],
            "peak_device_bytes": report.get("peak_device_bytes"),
            "warnings": report["warnings"],
            **self.row,
        }

    def read_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelView]:
        """A copy of the shared model, whose peak memory counts from here on."""
        reset_peak(self.shared.device)
        model = copy.deepcopy(self.shared.model)
        return model, self.shared.tokenizer, replace(self.shared.view, model=model)

    def read_tokens(self, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
        """The shared text."""
        return self.shared.blocks

    def collect_statistics(self, view: ModelView, blocks: TokenBlocks, device: torch.device, journal: Journal) -> None:
        """The shared statistics, or those of a model that was pruned first."""
        if self.pruned:  # the shared statistics are those of the whole model
            super().collect_statistics(view, blocks, device, journal)
        else:
            self.store = self.shared.store(self.progress)

    def save_checkpoint(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, journal: Journal
    ) -> None:
        """Measure what the journal's groups stand for; write them if the comparison keeps its checkpoints."""
        self.peak = peak(self.shared.device)
        begun = time.perf_counter()
        self.row = self.yardstick.measure(
            model, tokenizer, self.shared.device, self.progress, partial(self._weights, plan, journal)
        )
        self.row["evaluate_seconds"] = time.perf_counter() - begun
        if self.write:
            super().save_checkpoint(model, tokenizer, plan, journal)

    def _weights(self, plan: Plan, journal: Journal, device: torch.device) -> dict[str, Tensor]:
        """The weights that the packed factors of a finished run stand for, as ``nn.Linear`` holds them."""
        found: dict[str, Tensor] = {}
        dtype = self.yardstick.dtype or self.shared.model.dtype
        for index, group in enumerate(plan.groups):
            tensors = {key: tensor.to(device) for key, tensor in journal.read(index)[0].items()}
            weight = rebuild(tensors, group.spec).T.to(dtype)
            parts = torch.split(weight, list(group.spec.d_out))
            found |= {f"{name}.weight": part for name, part in zip(group.spec.modules, parts, strict=True)}
        return found | shared_weights(plan, journal, device, dtype)

    def _stored(self) -> dict[str, Any]:
        """Figures of a checkpoint that was written earlier."""
        begun = time.perf_counter()
        model: Any = load(self.out)
        model.dequantize(dtype=self.yardstick.dtype or model.dtype)
        row = self.yardstick.measure(model, self.shared.tokenizer, self.shared.device, self.progress)
        return row | {"evaluate_seconds": time.perf_counter() - begun}

    def make_report(
        self,
        model: PreTrainedModel,
        plan: Plan,
        rows: list[dict[str, Any]],
        blocks: TokenBlocks,
        device: torch.device,
    ) -> dict[str, Any]:
        """The report of a run, or as much of it as the row needs where nothing is written."""
        if self.write:
            return super().make_report(model, plan, rows, blocks, device) | self.peak
        return {
            "keep_actual": plan.keep_actual,
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            "file_bytes_before": plan.bytes_before + plan.other_bytes,
            "seconds": dict(self.seconds),
            "device": device_name(device),
            "versions": versions(),
            "groups": rows,
            "warnings": self.notes,
            **self.peak,
        }


class PruneRow(PruneRun):
    """A row of a pruning method: model, tokens and distances are lent, the result is measured.

    Args: see :class:`RowRun`.
    """

    def __init__(
        self,
        shared: Shared,
        yardstick: Yardstick,
        recipe: Recipe,
        out: Path,
        *,
        save: bool,
        progress: Progress,
        command: str,
    ) -> None:
        super().__init__(shared.source, out, recipe, None, progress, command)
        self.shared, self.yardstick, self.save = shared, yardstick, save
        self.documents = Texts((), str(recipe.calibration.source))
        self.row: dict[str, Any] = {}
        self.peak: dict[str, int] = {}

    def measured(self, fresh: bool) -> dict[str, Any]:
        """Run, and give the figures of the row; see :func:`cospadi.evaluation.compare.compare`."""
        report = self.prune(fresh).report
        if not self.row:  # the checkpoint was written by an earlier comparison, perhaps with another yardstick
            self._measure(load(self.out))
        return {
            "keep_actual": report["keep_actual"],
            "bytes": report["bytes_after"],
            "bytes_before": report["bytes_before"],
            "total_bytes": report["bytes_after"] + report["other_bytes"],
            "error": None,
            "seconds": report["seconds"]["prune"],
            "peak_memory_bytes": report["peak_memory_bytes"],
            "peak_device_bytes": report.get("peak_device_bytes"),
            "warnings": report["warnings"],
            "removed": report["prune"]["removed"],
            **self.peak,
            **self.row,
        }

    def read_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelView]:
        """A copy of the shared model, whose peak memory counts from here on."""
        reset_peak(self.shared.device)
        model = copy.deepcopy(self.shared.model)
        return model, self.shared.tokenizer, replace(self.shared.view, model=model)

    def read_tokens(self, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
        """The shared text."""
        return self.shared.blocks

    def make_evidence(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> Evidence:
        """The evidence that all pruning rows share."""
        return self.shared.evidence(self.recipe.seed, self.progress)

    def write_checkpoint(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Measure the pruned model; write it if the comparison keeps its checkpoints."""
        self.peak = peak(self.shared.device)
        self._measure(model)
        return super().write_checkpoint(model, tokenizer) if self.save else None

    def _measure(self, model: PreTrainedModel) -> None:
        begun = time.perf_counter()
        self.row = self.yardstick.measure(model, self.shared.tokenizer, self.shared.device, self.progress)
        self.row["evaluate_seconds"] = time.perf_counter() - begun


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A directory that is gone once what was done in it is done; after an interruption it stays."""
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
