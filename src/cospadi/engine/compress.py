"""`compress`: from a model and a recipe to a directory that ``from_pretrained`` loads; durable after every group."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import TextSource, TokenBlocks, fisher
from cospadi.checkpoint import storage_dtype
from cospadi.engine.allocate.rules import final_plan, require_loss
from cospadi.engine.context import RunContext
from cospadi.engine.factorise import factorise_group
from cospadi.engine.inputs import Inputs, given_text
from cospadi.engine.journal import Journal, check_complete, check_output
from cospadi.engine.outputs import Checkpoint, environment, write_report
from cospadi.engine.plan.extra import carried_tensors, extra_bytes, without_extra
from cospadi.engine.plan.order import order_of, plain_share, suited
from cospadi.engine.plan.plan import Plan, make_plan
from cospadi.engine.plan.pruning import check_section, prune_first
from cospadi.engine.plan.selection import chosen_modules, restricted
from cospadi.engine.plan.target import Beside
from cospadi.engine.plan.text import needs_text
from cospadi.engine.rehearsal import rehearse
from cospadi.engine.tune.sequential import Outcome, Sequential, require_layers
from cospadi.io import expanded
from cospadi.methods import get_method
from cospadi.model_view import ModelView, check_weights, discover, model_source, predicts_tokens
from cospadi.options import recipe_from
from cospadi.progress import Progress, silent
from cospadi.recipe import Recipe
from cospadi.runtime.devices import resolve_device
from cospadi.runtime.fingerprints import versions
from cospadi.runtime.memory import memory_errors


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        from cospadi.report.results import run_line

        return run_line(self.out, self.report)

    def _repr_html_(self) -> str:
        from cospadi.report.results import run_fragment

        return run_fragment(self.out, self.report)


def compress(
    model: object,
    out: str | Path,
    *,
    tokenizer: object = None,
    calibration: TextSource | dict[str, Any] | None = None,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    command: str = "",
    **options: Any,
) -> Result:
    """Compress a model into a directory that ``from_pretrained`` loads; see :func:`cospadi.compress`.

    Args:
        model: local directory, hub id, or a transformers model, which stays as it is.
        out: output directory: new, empty, or of the same run.
        tokenizer: of a model in memory.
        calibration: whatever :func:`~cospadi.engine.inputs.given_text` takes.
        recipe: a recipe, its keys and values, or the path of one; the other arguments override it.
        fresh: forget an earlier run in `out`.
        progress: called with (phase, done, total, detail, error so far).
        command: the command line, for the report.
        **options: see :func:`~cospadi.options.recipe_from`.

    Returns:
        paths, sizes and errors.

    Raises:
        CospadiError: see `cospadi.errors`; the message names cause and remedy.
    """
    texts, section = given_text(calibration)
    merged, progress = recipe_from(recipe, options | {"calibration": section}), progress or silent
    inputs = Inputs(model_source(model, tokenizer), merged, texts, progress)
    with memory_errors():
        return CompressRun(inputs, Checkpoint(expanded(out), progress), merged, progress, command).go(fresh)


class CompressRun:
    """The steps of one run, in order.

    Args:
        inputs: where model, text and statistics come from.
        outputs: what becomes of the factors.
        recipe: of the run.
        progress: called as progress(phase, done, total, detail, error).
        command: the command line, for the report.
    """

    def __init__(self, inputs: Inputs, outputs: Checkpoint, recipe: Recipe, progress: Progress, command: str) -> None:
        self.inputs, self.outputs, self.asked = inputs, outputs, recipe
        self.progress, self.command = progress, command
        self.recipe = recipe
        """What is carried out: `asked`, with a `keep` that counts against a model that was pruned first."""
        self.seconds: dict[str, float] = {}
        self.pruned: dict[str, Any] = {}

    def go(self, fresh: bool) -> Result:
        """Everything from reading the model to writing the report."""
        begun, out = time.perf_counter(), self.outputs.out
        self._check()
        device = resolve_device(self.recipe.device)
        self.recipe = suited(self.recipe, device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            self.progress("read", 0, 1, "text and model")
            model, tokenizer = self.inputs.open("compress")
            require_loss(model, self.recipe)
            view = self._view(model)
            self._carry(view)
            plan = self._planned(view, tokenizer) if self.recipe.prune is None else None
            blocks = self.inputs.tokens(model, tokenizer)
            self.progress("read", 1, 1)
            fingerprint = self.inputs.fingerprint(model, blocks, device, self.recipe)
            with Journal(out, fingerprint, fresh=fresh) as journal:
                finished = journal.report()
                if finished is not None and (out / "config.json").exists():
                    check_complete(out)
                    journal.finish()  # in case the run was stopped just before it did
                    return Result(out, finished, len(finished.get("groups", [])), complete=True)
                self.seconds["read"] = time.perf_counter() - begun
                rehearse(view, plan, tokenizer, self.outputs.extra)
                if plan is None:
                    view, plan = self._prune(view, tokenizer, blocks, device)
                context = self._context(view, blocks, device, journal)
                with self._timed("allocate"):
                    plan = final_plan(context, self.recipe, plan, journal)
                found = self._factorise(context, plan, journal)
                with self._timed("save"):
                    self.outputs.save(view.model, tokenizer, plan, journal)
                self.seconds["total"] = time.perf_counter() - begun
                notes = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
                report = self._report(context, plan, found, blocks) | {"warnings": notes, "fingerprint": journal.record}
                write_report(out, self.asked.to_yaml(), report)
                journal.finish()
        return Result(out, report, found.resumed)

    def _check(self) -> None:
        """Refuse what needs neither model nor text to be refused."""
        get_method(self.recipe.method).check(self.recipe.options)
        self.recipe.require_budget()
        if self.recipe.prune is not None:
            check_section(self.recipe.prune)
        check_output(self.outputs.out)
        if needs_text(self.recipe):
            self.inputs.require_text()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun

    def _view(self, model: PreTrainedModel) -> ModelView:
        """The linear groups that the recipe compresses."""
        view = discover(model)
        check_weights(view)
        return restricted(view, chosen_modules(view, self.recipe))

    def _carry(self, view: ModelView) -> None:
        """Find the stored tensors that are copied; a size of all files holds for them, too."""
        self.outputs.extra = carried_tensors(self.inputs.source, view, self.recipe)
        self.recipe = without_extra(self.recipe, self.outputs.extra)

    def _planned(self, view: ModelView, tokenizer: PreTrainedTokenizerBase) -> Plan:
        plan = make_plan(view, self.recipe, Beside(tokenizer, indexed=bool(self.outputs.extra)))
        if order_of(self.recipe, plan).layers:
            require_layers(plan)
        return plan

    def _prune(
        self, view: ModelView, tokenizer: PreTrainedTokenizerBase, blocks: TokenBlocks, device: torch.device
    ) -> tuple[ModelView, Plan]:
        """Remove blocks first; from then on the recipe's keep counts against the pruned model."""
        with self._timed("prune"):
            view, self.recipe, self.pruned = prune_first(view, self.recipe, blocks.ids, device, self.progress)
        return view, self._planned(view, tokenizer)

    def _context(self, view: ModelView, blocks: TokenBlocks, device: torch.device, journal: Journal) -> RunContext:
        """Statistics of every group's input, and whatever else the method needs."""
        gradients, weights, plain = {}, None, plain_share(self.recipe)
        with self._timed("calibrate"):
            place = (view, blocks, device, journal.statistics)
            if plain < 1:
                weights = self.inputs.token_weights(*place, whole=not self.pruned)
            store = self.inputs.statistics(*place, whole=not self.pruned, weights=weights)
            if "fisher" in get_method(self.recipe.method).needs:
                reporting = partial(self.progress, "calibrate")
                gradients = fisher(view, blocks.ids, device=device, progress=reporting)
        dtype = storage_dtype(view.model)
        run = (view, store, blocks.ids, device, dtype, self.recipe.seed, self.progress)
        return RunContext(*run, fisher=gradients, weights=weights, plain_share=plain)

    def _factorise(self, context: RunContext, plan: Plan, journal: Journal) -> Outcome:
        """Factors of every group, each durable before the next is begun."""
        begun = time.perf_counter()
        if order_of(self.recipe, plan).layers:
            found = Sequential(context, plan, self.recipe, journal).go()
            refining = sum(layer.get("refine", {}).get("seconds", 0.0) for layer in found.layers)
            refining += found.predictions.get("seconds", 0.0)
            if self.recipe.refine is not None:
                self.seconds["refine"] = refining
            self.seconds["factorise"] = time.perf_counter() - begun - refining
            return found
        found, missed, energy = Outcome(), 0.0, 0.0
        for index, group in enumerate(plan.groups):
            error = missed / energy if energy else None
            self.progress("factorise", index, len(plan.groups), group.spec.name, error)
            if journal.groups.has(index):
                info = journal.groups.read(index)[1]
                found.resumed += 1
            else:
                packed, info = factorise_group(context, group)
                journal.groups.write(index, packed, info)
            missed, energy = missed + info["missed"], energy + info["energy"]
            found.groups.append({key: info[key] for key in ("error", "missed", "energy", "seconds")})
        self.progress("factorise", len(plan.groups), len(plan.groups), "", missed / energy if energy else None)
        self.seconds["factorise"] = time.perf_counter() - begun
        return found

    def _report(self, context: RunContext, plan: Plan, found: Outcome, blocks: TokenBlocks) -> dict[str, Any]:
        """The content of ``report.json``, as plain data."""
        model = context.view.model
        report: dict[str, Any] = {
            "cospadi_version": versions()["cospadi"],
            "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
            "command": self.command,
            "model": self.inputs.name,
            "architecture": (model.config.architectures or [type(model).__name__])[0],
            "generates": predicts_tokens(model),
            "method": self.recipe.method,
            "keep_requested": plan.keep_requested,
            "keep_actual": plan.keep_actual,
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            # Compressed layers are counted at 16 bits a weight on both sides; the rest in the model's own dtype.
            "file_bytes_before": plan.bytes_before + plan.other_bytes + extra_bytes(self.outputs.extra),
            "parameters": plan.bytes_before // 2 + plan.other_bytes // model.dtype.itemsize,
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
            "seed": self.recipe.seed,
            "recipe": self.asked.model_dump(mode="json", exclude_none=True),
            "calibration": blocks.facts,
            "groups": [group.row() | info for group, info in zip(plan.groups, found.groups, strict=True)],
        }
        report |= environment(context.device) | self.outputs.facts()
        if context.weights is not None:
            report["gram"] = {"kind": "loss", "blend": context.plain_share}
            report["gram"] |= {"lacking": context.weights.lacking} if context.weights.lacking else {}
        report |= {"layers": found.layers} if found.layers else {}
        report |= {"predictions": found.predictions} if found.predictions else {}
        return report | self._of_the_whole(plan)

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
        }
