"""Run a recipe: statistics, factors, checkpoint, report; durable after every group."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import StatisticsStore, Texts, TokenBlocks, collect, fisher, read_texts, token_blocks
from cospadi.checkpoint import file_bytes, install_packed, replace_modules, save, storage_dtype
from cospadi.checkpoint.formats.shared_hf import save_shared
from cospadi.engine.allocate.rules import final_plan
from cospadi.engine.factorise import factorise_group, split_packed
from cospadi.engine.journal import Journal, check_complete, check_output
from cospadi.engine.plan.plan import Plan, PlannedGroup, group_row, make_plan
from cospadi.engine.plan.pruning import check_section, prune_first
from cospadi.engine.plan.selection import chosen_modules, restricted
from cospadi.engine.plan.shared import PlannedShared, factorise_shared, final_shared_plan, install_plan
from cospadi.engine.tune.sequential import LayerByLayer, require_layers
from cospadi.errors import CalibrationError, ModelError
from cospadi.io import disk_errors, write_durably
from cospadi.methods import get_method
from cospadi.model_view import (
    ModelView,
    check_length,
    check_weights,
    discover,
    is_compressed,
    model_name,
    open_model,
)
from cospadi.progress import Progress
from cospadi.recipe import Recipe
from cospadi.runtime.devices import device_name, resolve_device, widened
from cospadi.runtime.fingerprints import versions, weights_sha256
from cospadi.runtime.memory import peak_memory


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        out: the checkpoint directory.
        report: the content of ``report.json``.
        resumed: groups taken over from an interrupted run; all of them if the run was already complete.
        complete: the run was already complete, and nothing was done.
    """

    out: Path
    report: dict[str, Any]
    resumed: int
    complete: bool = False

    @property
    def keep_actual(self) -> float:
        """Share of the compressed layers' bytes that is kept."""
        return float(self.report["keep_actual"])


class Run:
    """The steps of one run, in order; each leaves what the next one needs.

    A comparison takes the steps one by one: what subclasses may replace is `read_model`, `read_tokens`,
    `collect_statistics`, `save_checkpoint` and `make_report`. The order of steps, the journal and the factorisation
    stay those of :meth:`go`.

    Args:
        source: of the model: local directory or hub id.
        out: the output directory.
        recipe: of the run.
        texts: calibration documents, where they are not to be read from the recipe's source.
        progress: called as progress(phase, done, total, detail, error).
        command: the command line, for the report.
    """

    def __init__(
        self, source: str, out: Path, recipe: Recipe, texts: list[str] | None, progress: Progress, command: str
    ) -> None:
        self.source, self.out, self.recipe, self.texts = source, out, recipe, texts
        self.progress, self.command = progress, command
        self.name = model_name(source)
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.predictions: dict[str, Any] = {}
        self.fisher: dict[str, Tensor] = {}
        self.asked = recipe
        self.pruned: dict[str, Any] = {}

    def go(self, fresh: bool) -> Result:
        """Everything from reading the model to writing the report."""
        begun = time.perf_counter()
        method = get_method(self.recipe.method)
        method.check(self.recipe.options)
        self.recipe.require_budget()
        if self.recipe.prune is not None:
            check_section(self.recipe.prune)
        check_output(self.out)
        device = resolve_device(self.recipe.device)
        if self.recipe.calibration.source is None:
            raise CalibrationError(
                "no calibration text: name a .txt, .json, .jsonl or .parquet file, or a hub data set, "
                "with --calibration"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            self.progress("read", 0, 1, "text and model")
            model, tokenizer, view = self.read_model()
            plan = self._planned(view) if self.recipe.prune is None else None
            blocks = self.read_tokens(tokenizer)
            self.progress("read", 1, 1)
            with Journal(self.out, self._fingerprint(model, blocks, device), fresh=fresh) as journal:
                finished = journal.report()
                if finished is not None and (self.out / "config.json").exists():
                    check_complete(self.out)
                    journal.finish()  # in case the run was stopped just before it did
                    return Result(self.out, finished, len(finished.get("groups", [])), complete=True)
                self.seconds["read"] = time.perf_counter() - begun
                if plan is None:
                    view, plan = self._prune(view, blocks, device)
                self.collect_statistics(view, blocks, device, journal)
                if "fisher" in method.needs:
                    self._collect_fisher(view, blocks, device)
                allocating = time.perf_counter()
                decide = final_shared_plan if plan.shared else partial(final_plan, fisher=self.fisher)
                plan = decide(view, self.recipe, plan, self.store, device, journal, self.progress, blocks.ids)
                self.seconds["allocate"] = time.perf_counter() - allocating
                if self.recipe.anchor or self.recipe.refine is not None:
                    resumed, rows, layers = self._with_feedback(view, plan, blocks, device, journal)
                else:
                    (resumed, rows), layers = self._factorise(view, plan, device, journal), []
                self.save_checkpoint(model, tokenizer, plan, journal)
                self.notes = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
                self.seconds["total"] = time.perf_counter() - begun
                report = self.make_report(model, plan, rows, blocks, device) | ({"layers": layers} if layers else {})
                report |= {"predictions": self.predictions} if self.predictions else {}
                report |= self._of_the_whole(plan)
                # The report is last: where it is, the run is done.
                write_durably(self.out / "recipe.yaml", self.asked.to_yaml().encode())
                write_durably(self.out / "report.json", (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())
                journal.finish()
        return Result(self.out, report, resumed)

    def read_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelView]:
        """The dense model, its tokenizer, and a view of the linear groups that the recipe compresses.

        Raises:
            ModelError: if the model cannot be read, or is compressed already.
            CalibrationError: if the text cannot be read, or the model has no positions for its sequences.
        """
        self.documents  # noqa: B018 - read first: that is quick, and it is where most mistakes are
        model, tokenizer = open_model(self.source)
        if is_compressed(model.config):
            raise ModelError(f"{self.source} is already compressed by cospadi: compress the dense model instead")
        check_length(model, self.recipe.calibration.seq_len)
        view = discover(model)
        check_weights(view)
        return model, tokenizer, restricted(view, chosen_modules(view, self.recipe))

    def _planned(self, view: ModelView) -> Plan:
        plan = make_plan(view, self.recipe)
        if self.recipe.anchor or self.recipe.refine is not None:
            require_layers(plan)
        return plan

    def _prune(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> tuple[ModelView, Plan]:
        """Remove blocks first; from then on the recipe's keep counts against the pruned model."""
        begun = time.perf_counter()
        view, self.recipe, self.pruned = prune_first(view, self.recipe, blocks.ids, device, self.progress)
        self.seconds["prune"] = time.perf_counter() - begun
        return view, self._planned(view)

    def _of_the_whole(self, plan: Plan) -> dict[str, Any]:
        """What a report says otherwise where blocks were removed first: shares count against the original model."""
        if not self.pruned:
            return {}
        before = self.pruned["bytes_before"]
        return {
            "prune": self.pruned,
            "keep_requested": self.asked.keep or plan.keep_requested * self.pruned["bytes_after"] / before,
            "keep_actual": plan.bytes_after / before,
            "bytes_before": before,
            "other_bytes": plan.other_bytes,
            "file_bytes_before": self.pruned["file_bytes_before"],
            "parameters": self.pruned["parameters"],
            "recipe": self.asked.model_dump(mode="json", exclude_none=True),
        }

    @cached_property
    def documents(self) -> Texts:
        """The calibration text."""
        options = self.recipe.calibration
        return read_texts(self.texts if self.texts is not None else str(options.source), field=options.field)

    def read_tokens(self, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
        """The calibration text in blocks of tokens."""
        options = self.recipe.calibration
        return token_blocks(
            self.documents, tokenizer, samples=options.samples, seq_len=options.seq_len, seed=self.recipe.seed
        )

    def _fingerprint(self, model: PreTrainedModel, blocks: TokenBlocks, device: torch.device) -> dict[str, Any]:
        recipe = self.recipe.model_dump(mode="json")
        # The text is known by its tokens; where its file lies does not matter, nor how the device was named.
        recipe["calibration"].pop("source")
        recipe.pop("device")
        found = versions()
        return {
            "model": {"name": self.name, "sha256": weights_sha256(model)},
            "recipe": recipe,
            "text": {"tokens_sha256": blocks.sha256},
            "device": device.type,
            "versions": {"cospadi": found["cospadi"], "torch": found["torch"]},
        }

    def collect_statistics(self, view: ModelView, blocks: TokenBlocks, device: torch.device, journal: Journal) -> None:
        """Leave the statistics of every group's input in `self.store`, and what that took in `self.seconds`."""
        begun = time.perf_counter()
        self.store = StatisticsStore(journal.statistics, {"tokens": blocks.sha256, "model": self.name})
        with widened(view.model, device):
            collect(
                view,
                blocks.ids,
                device=device,
                store=self.store,
                progress=partial(self.progress, "calibrate"),
            )
        self.seconds["calibrate"] = time.perf_counter() - begun

    def _collect_fisher(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> None:
        begun = time.perf_counter()
        self.fisher = fisher(view, blocks.ids, device=device, progress=partial(self.progress, "calibrate"))
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + time.perf_counter() - begun

    def _factorise(
        self, view: ModelView, plan: Plan, device: torch.device, journal: Journal
    ) -> tuple[int, list[dict[str, Any]]]:
        begun = time.perf_counter()
        rows, resumed, missed, energy = [], 0, 0.0, 0.0
        groups: list[PlannedGroup | PlannedShared] = [*plan.groups, *plan.shared]
        for index, group in enumerate(groups):
            self.progress("factorise", index, len(groups), group.spec.name, missed / energy if energy else None)
            if journal.has(index):
                info = journal.read(index)[1]
                resumed += 1
            elif isinstance(group, PlannedShared):
                tensors, info = factorise_shared(view, group.spec, self.store, device)
                journal.write(index, tensors, info)
            else:
                tensors, info = factorise_group(
                    get_method(group.spec.method),
                    group.options,
                    group.spec,
                    [view.weight(name) for name in group.spec.modules],
                    [self.store.load(source) for source in group.sources or (group.source,)],
                    seed=self.recipe.seed,
                    device=device,
                    dtype=storage_dtype(view.model),
                    fisher=[self.fisher[name] for name in group.spec.modules if name in self.fisher],
                )
                journal.write(index, tensors, info)
            missed, energy = missed + info["missed"], energy + info["energy"]
            row = group.row() if isinstance(group, PlannedShared) else group_row(group)
            rows.append(row | {key: info[key] for key in ("error", "missed", "energy", "seconds")})
        self.progress("factorise", len(groups), len(groups), "", missed / energy if energy else None)
        self.seconds["factorise"] = time.perf_counter() - begun
        return resumed, rows

    def _with_feedback(
        self, view: ModelView, plan: Plan, blocks: TokenBlocks, device: torch.device, journal: Journal
    ) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
        begun = time.perf_counter()
        dtype = storage_dtype(view.model)
        found = LayerByLayer(
            view, plan, self.recipe, self.store, blocks.ids, device, journal, dtype, self.progress, self.fisher
        ).go()
        refining = sum(layer.get("refine", {}).get("seconds", 0.0) for layer in found.layers)
        refining += found.predictions.get("seconds", 0.0)
        self.predictions = found.predictions
        self.seconds["factorise"] = time.perf_counter() - begun - refining
        if self.recipe.refine is not None:
            self.seconds["refine"] = refining
        return (
            found.resumed,
            [group_row(g) | info for g, info in zip(plan.groups, found.groups, strict=True)],
            found.layers,
        )

    def save_checkpoint(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, journal: Journal
    ) -> None:
        """Put the finished groups of the journal into the model and write the checkpoint."""
        begun = time.perf_counter()
        self.progress("save", 0, 1, self.out.name)
        if plan.shared:
            shared = install_plan(model, plan, journal)
            with disk_errors(self.out):
                save_shared(model, tokenizer, self.out, shared)
        else:
            specs = [group.spec for group in plan.groups]
            replace_modules(model, specs)
            for index, spec in enumerate(specs):
                with journal.checked(index):
                    install_packed(model, spec, *split_packed(journal.read(index)[0]))
            with disk_errors(self.out):
                save(model, tokenizer, self.out, specs)
        self.progress("save", 1, 1)
        self.seconds["save"] = time.perf_counter() - begun

    def make_report(
        self,
        model: PreTrainedModel,
        plan: Plan,
        rows: list[dict[str, Any]],
        blocks: TokenBlocks,
        device: torch.device,
    ) -> dict[str, Any]:
        """The content of ``report.json``, as plain data.

        Args:
            model: as it was saved.
            plan: that was carried out.
            rows: of the groups, with their errors.
            blocks: the calibration text.
            device: where the run worked.
        """
        memory = peak_memory()
        found = versions()
        # Compressed layers are counted at 16 bits a weight on both sides; the rest in the model's own dtype.
        return {
            "cospadi_version": found["cospadi"],
            "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
            "command": self.command,
            "model": self.name,
            "architecture": (model.config.architectures or [type(model).__name__])[0],
            "method": self.recipe.method,
            "keep_requested": plan.keep_requested,
            "keep_actual": plan.keep_actual,
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            "file_bytes": file_bytes(self.out),
            "file_bytes_before": plan.bytes_before + plan.other_bytes,
            "parameters": plan.bytes_before // 2 + plan.other_bytes // model.dtype.itemsize,
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
            "peak_memory_bytes": memory["host"],
            "peak_device_bytes": memory.get("device"),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": found,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "calibration": blocks.report | {"sha256": blocks.sha256},
            "groups": rows,
            "warnings": self.notes,
        }
