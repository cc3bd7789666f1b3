"""Prune a model: statistics, the cut, a checkpoint, a report."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import TextSource, TokenBlocks
from cospadi.checkpoint import is_compressed
from cospadi.checkpoint.headers import read_directory
from cospadi.engine.inputs import Inputs, given_text
from cospadi.engine.journal import Journal, check_output
from cospadi.engine.outputs import PrunedCheckpoint, environment, write_report
from cospadi.engine.plan.extra import carried_tensors
from cospadi.engine.plan.pruning import check_section, decide, estimate_prune
from cospadi.engine.rehearsal import rehearse
from cospadi.errors import CheckpointError, NumericalError, OutputError
from cospadi.io import expanded
from cospadi.model_view import ModelView, discover_layers, model_source, open_config, predicts_tokens, skeleton
from cospadi.options import prune_recipe_from
from cospadi.progress import Progress, silent
from cospadi.pruning import block_bytes, get_pruning_method
from cospadi.recipe import Recipe
from cospadi.runtime.devices import resolve_device, widened
from cospadi.runtime.fingerprints import versions
from cospadi.runtime.memory import memory_errors

_RECIPE_KEYS = {"prune", "calibration", "drop_extra", "device", "seed"}


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What a run left behind.

    Attributes:
        out: the checkpoint directory.
        report: the content of ``report.json``.
        complete: the run was already complete, and nothing was done.
    """

    out: Path
    report: dict[str, Any]
    complete: bool = False

    @property
    def removed(self) -> list[int]:
        """Indices of the removed blocks in the original model; empty where width was removed."""
        return list(self.report["prune"]["removed"])

    @property
    def keep_actual(self) -> float:
        """Share of the blocks' bytes that is kept."""
        return float(self.report["keep_actual"])

    def __repr__(self) -> str:
        from cospadi.report.results import prune_line

        return prune_line(self.out, self.report)

    def _repr_html_(self) -> str:
        from cospadi.report.results import prune_fragment

        return prune_fragment(self.out, self.report)


def prune(
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
) -> PruneResult:
    """Remove blocks (or width) from a model, without retraining; see :func:`cospadi.prune`.

    Args:
        model: local directory, hub id, or a transformers model, which stays as it is.
        out: output directory: new, empty, or of the same run.
        tokenizer: of a model in memory.
        calibration: whatever :func:`~cospadi.engine.inputs.given_text` takes.
        recipe: a recipe, its keys and values, or the path of one, with a section ``prune``; the other arguments
            override it.
        fresh: forget an earlier run in `out`.
        progress: called with (phase, done, total, detail, error).
        command: the command line, for the report.
        **options: see :func:`~cospadi.options.prune_recipe_from`.

    Returns:
        paths, sizes, and what was cut.

    Raises:
        CospadiError: see `cospadi.errors`; the message names cause and remedy.
    """
    texts, section = given_text(calibration)
    merged, progress = prune_recipe_from(recipe, options | {"calibration": section}), progress or silent
    inputs = Inputs(model_source(model, tokenizer), merged, texts, progress)
    with memory_errors():
        return PruneRun(inputs, PrunedCheckpoint(expanded(out), progress), merged, progress, command).go(fresh)


def plan_prune(model: str | Path, recipe: Recipe) -> dict[str, Any]:
    """How much would go, once it is known that the result could be saved and opened; no weights are read.

    Raises:
        CospadiError: see :func:`prune`.
    """
    planned = estimate_prune(model, recipe)
    view = discover_layers(skeleton(open_config(model)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        extra = carried_tensors(model, view, recipe)
    rehearse(view, None, None, extra)
    return planned | {"warnings": [str(w.message) for w in caught if w.category is UserWarning]}


def check_matrices(view: ModelView) -> None:
    """Look for NaN and Inf in the weights of the blocks.

    Raises:
        NumericalError: naming the first such tensor.
    """
    for index, layer in enumerate(view.layers):
        for name, parameter in layer.named_parameters():
            bad = int(torch.count_nonzero(~parameter.isfinite()))
            if bad:
                raise NumericalError(
                    f"{view.layers_name}.{index}.{name}: {bad} of {parameter.numel()} entries are NaN or Inf; "
                    "the model is damaged"
                )


class PruneRun:
    """The steps of a run that only prunes.

    Args:
        inputs: where model and text come from.
        outputs: what becomes of the pruned model.
        recipe: with a section ``prune``.
        progress: called as progress(phase, done, total, detail, error).
        command: the command line, for the report.
    """

    def __init__(
        self, inputs: Inputs, outputs: PrunedCheckpoint, recipe: Recipe, progress: Progress, command: str
    ) -> None:
        assert recipe.prune is not None
        self.inputs, self.outputs, self.recipe, self.section = inputs, outputs, recipe, recipe.prune
        self.progress, self.command = progress, command
        self.seconds: dict[str, float] = {}

    def go(self, fresh: bool) -> PruneResult:
        """Everything from reading the model to writing the report."""
        begun, out = time.perf_counter(), self.outputs.out
        check_section(self.section)
        check_output(out)
        device = resolve_device(self.recipe.device)
        if get_pruning_method(self.section.method).text:
            self.inputs.require_text()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            self.progress("read", 0, 1, "text and model")
            model, tokenizer = self.inputs.open("prune")
            view = discover_layers(model)
            self.outputs.extra = carried_tensors(self.inputs.source, view, self.recipe)
            check_matrices(view)
            blocks = self.inputs.tokens(model, tokenizer)
            self.progress("read", 1, 1)
            fingerprint = self.inputs.fingerprint(model, blocks, device, self.recipe) | {"prune": True}
            with Journal(out, fingerprint, fresh=fresh) as journal:
                finished = journal.report()
                if finished is not None and (out / "config.json").exists():
                    _check_whole(out)
                    journal.finish()
                    return PruneResult(out, finished, complete=True)
                rehearse(view, None, tokenizer, self.outputs.extra)
                self.seconds["read"] = time.perf_counter() - begun
                report = self._cut(view, tokenizer, blocks, device)
                self.seconds["total"] = time.perf_counter() - begun
                report["seconds"] = {key: round(value, 3) for key, value in self.seconds.items()}
                report["fingerprint"] = journal.record
                report["warnings"] = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
                write_report(out, _recipe_yaml(self.recipe), report)
                journal.finish()
        return PruneResult(out, report)

    def _cut(
        self, view: ModelView, tokenizer: PreTrainedTokenizerBase, blocks: TokenBlocks, device: torch.device
    ) -> dict[str, Any]:
        """Decide, cut, save; what the report says of it."""
        before = _sizes(view)
        evidence = self.inputs.evidence(view, blocks, device)
        begun = time.perf_counter()
        with widened(evidence.view.model, device):
            # The decision comes first: what cannot be is refused before any text is run.
            edit = decide(self.section, evidence)
            pairs = evidence.pairs if len(blocks) else None
        self.seconds["calibrate"] = evidence.seconds_since(begun)
        model = edit.apply(view)
        self.seconds["prune"] = time.perf_counter() - begun - self.seconds["calibrate"]
        after = _sizes(ModelView(model, view.layers_name, (), view.extra_outputs))
        saving = time.perf_counter()
        self.outputs.save(model, tokenizer)
        self.seconds["save"] = time.perf_counter() - saving
        return self._report(model, before, after, blocks) | {
            "blocks_after": before["blocks"] - len(edit.facts()["removed"]),
            "prune": edit.facts(),
            "distances": pairs and {"cosine": _rounded(pairs.cosine), "angular": _rounded(pairs.angular)},
            **environment(device),
            **self.outputs.facts(),
        }

    def _report(
        self, model: PreTrainedModel, before: dict[str, int], after: dict[str, int], blocks: TokenBlocks
    ) -> dict[str, Any]:
        """What the report says of model, sizes and text."""
        return {
            "cospadi_version": versions()["cospadi"],
            "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
            "command": self.command,
            "model": self.inputs.name,
            "architecture": (model.config.architectures or [type(model).__name__])[0],
            "generates": predicts_tokens(model),
            "method": self.section.method,
            "stock": not is_compressed(model.config),
            "keep_requested": self.section.keep_blocks,
            "keep_actual": after["bytes"] / before["bytes"],
            "blocks_before": before["blocks"],
            "bytes_before": before["bytes"],
            "bytes_after": after["bytes"],
            "parameters_before": before["parameters"],
            "parameters": after["parameters"],
            "file_bytes_before": before["file_bytes"],
            "other_bytes": after["file_bytes"] - after["block_bytes"],
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True, include=_RECIPE_KEYS),
            "calibration": blocks.facts,
        }


def _sizes(view: ModelView) -> dict[str, int]:
    every = list(view.model.parameters())  # tied ones stand once
    matrices = [p for layer in view.layers for p in layer.parameters() if p.ndim >= 2]
    return {
        "blocks": len(view.layers),
        "bytes": sum(block_bytes(layer) for layer in view.layers),
        "block_bytes": sum(p.numel() * p.element_size() for p in matrices),
        "parameters": sum(p.numel() for p in every),
        "file_bytes": sum(p.numel() * p.element_size() for p in every),
    }


def _rounded(distances: torch.Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in distances.tolist()]


def _recipe_yaml(recipe: Recipe) -> str:
    data = recipe.model_dump(exclude_none=True, include=_RECIPE_KEYS)
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def _check_whole(out: Path) -> None:
    try:
        read_directory(out)
    except CheckpointError as error:
        raise OutputError(
            f"the run is finished, but its checkpoint is damaged ({error}): prune again with --fresh"
        ) from None
