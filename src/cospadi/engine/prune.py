"""Prune a model: statistics, the cut, a checkpoint, a report; and pruning as the first step of a compression."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import TokenBlocks
from cospadi.checkpoint import file_bytes
from cospadi.checkpoint.checksums import write_checksums
from cospadi.checkpoint.headers import read_directory
from cospadi.checkpoint.publish import staged
from cospadi.engine.journal import Journal, check_output
from cospadi.engine.plan.pruning import check_section, decide
from cospadi.engine.run import Run
from cospadi.errors import CalibrationError, CheckpointError, ModelError, NumericalError, OutputError
from cospadi.io import disk_errors, write_durably
from cospadi.model_view import ModelView, check_length, discover_layers, is_compressed, open_model, source_name
from cospadi.progress import Progress, silent
from cospadi.pruning import Evidence, Tokens, block_bytes
from cospadi.recipe import Prune, Recipe, with_prune
from cospadi.runtime.devices import device_name, resolve_device, widened
from cospadi.runtime.fingerprints import versions
from cospadi.runtime.memory import memory_errors, peak_memory

_RECIPE_KEYS = {"prune", "calibration", "device", "seed"}


@dataclass(frozen=True)
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


def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    blocks: int | None = None,
    keep_blocks: float | None = None,
    options: dict[str, Any] | None = None,
    calibration: str | Path | list[str] | None = None,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    command: str = "",
    **changes: Any,
) -> PruneResult:
    """Remove blocks (or width) from a model, without retraining.

    What comes out is a checkpoint of the original architecture that loads without this package, unless the method or
    an option of it says otherwise. An interrupted run leaves no checkpoint; the same call does it again.

    Args:
        model: local directory or hub id.
        out: output directory: new, empty, or of the same run.
        method: name of a pruning method; left out: the recipe's, else ``replaceme``.
        blocks: how many go.
        keep_blocks: instead: share of the blocks' 16-bit bytes that stays, in (0, 1).
        options: of the method.
        calibration: text file, hub data set name, or a list of texts.
        recipe: a recipe, its keys and values, or the path of one, with a section ``prune``; the other arguments
            override it.
        fresh: forget an earlier run in `out`.
        progress: called with (phase, done, total, detail, error).
        command: the command line, for the report.
        **changes: ``device`` and ``seed``, as in a recipe.

    Returns:
        paths, sizes, and what was cut.

    Raises:
        CospadiError: see `cospadi.errors`; the message names cause and remedy.
    """
    base = Recipe.of(recipe)
    texts = list(calibration) if isinstance(calibration, (list, tuple)) else None
    if calibration is not None:
        changes["calibration"] = {"source": "a list of texts" if texts is not None else str(calibration)} | dict(
            changes.get("calibration", {})
        )
    merged = with_prune(base.merged(changes), method, blocks, keep_blocks, options)
    with memory_errors():
        return PruneRun(source_name(model), Path(out), merged, texts, progress or silent, command).prune(fresh)


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


class PruneRun(Run):
    """A run that only prunes.

    What subclasses may replace is `read_model`, `read_tokens`, `make_evidence` and `write_checkpoint`.
    """

    def prune(self, fresh: bool) -> PruneResult:
        """Everything from reading the model to writing the report."""
        begun = time.perf_counter()
        section = self.recipe.prune
        assert section is not None
        check_section(section)
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
            blocks = self.read_tokens(tokenizer)
            self.progress("read", 1, 1)
            fingerprint = self._fingerprint(model, blocks, device) | {"prune": True}
            with Journal(self.out, fingerprint, fresh=fresh) as journal:
                finished = journal.report()
                if finished is not None and (self.out / "config.json").exists():
                    _check_whole(self.out)
                    journal.finish()
                    return PruneResult(self.out, finished, complete=True)
                self.seconds["read"] = time.perf_counter() - begun
                report = self._cut(model, tokenizer, view, blocks, device, section)
                self.seconds["total"] = time.perf_counter() - begun
                report["seconds"] = {key: round(value, 3) for key, value in self.seconds.items()}
                report["warnings"] = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
                write_durably(self.out / "recipe.yaml", _recipe_yaml(self.recipe))
                # The report is last: where it is, the run is done.
                write_durably(self.out / "report.json", (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())
                journal.finish()
        return PruneResult(self.out, report)

    def read_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelView]:
        """The dense model, its tokenizer, and a view of its decoder layers; errors as in a compression."""
        self.documents  # noqa: B018 - read first: that is quick, and it is where most mistakes are
        model, tokenizer = open_model(self.source)
        if is_compressed(model.config):
            raise ModelError(f"{self.source} is already compressed by cospadi: prune the dense model instead")
        check_length(model, self.recipe.calibration.seq_len)
        view = discover_layers(model)
        check_matrices(view)
        return model, tokenizer, view

    def _cut(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        view: ModelView,
        blocks: TokenBlocks,
        device: torch.device,
        section: Prune,
    ) -> dict[str, Any]:
        """Decide, cut, save; what the report says of it."""
        before = _sizes(view)
        evidence = self.make_evidence(view, blocks, device)
        begun = time.perf_counter()
        with widened(evidence.view.model, device):
            # The decision comes first: what cannot be is refused before any text is run.
            edit = decide(section, evidence)
            pairs = evidence.pairs
        self.seconds["calibrate"] = evidence.seconds_since(begun)
        model = edit.apply(view)
        self.seconds["prune"] = time.perf_counter() - begun - self.seconds["calibrate"]
        after = _sizes(ModelView(model, view.layers_name, (), view.extra_outputs))
        saving = time.perf_counter()
        files = self.write_checkpoint(model, tokenizer)
        self.seconds["save"] = time.perf_counter() - saving
        memory, found = peak_memory(), versions()
        return {
            "cospadi_version": found["cospadi"],
            "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
            "command": self.command,
            "model": self.name,
            "architecture": (model.config.architectures or [type(model).__name__])[0],
            "method": section.method,
            "stock": not is_compressed(model.config),
            "keep_requested": section.keep_blocks,
            "keep_actual": after["bytes"] / before["bytes"],
            "blocks_before": before["blocks"],
            "blocks_after": before["blocks"] - len(edit.facts()["removed"]),
            "bytes_before": before["bytes"],
            "bytes_after": after["bytes"],
            "parameters_before": before["parameters"],
            "parameters": after["parameters"],
            "file_bytes_before": before["file_bytes"],
            "file_bytes": files,
            "other_bytes": after["file_bytes"] - after["block_bytes"],
            "prune": edit.facts(),
            "distances": {"cosine": _rounded(pairs.cosine), "angular": _rounded(pairs.angular)},
            "peak_memory_bytes": memory["host"],
            "peak_device_bytes": memory.get("device"),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": found,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True, include=_RECIPE_KEYS),
            "calibration": blocks.report | {"sha256": blocks.sha256},
        }

    def make_evidence(self, view: ModelView, blocks: TokenBlocks, device: torch.device) -> Evidence:
        """What pruning methods may ask of the model and the text."""
        return Evidence(view, Tokens(blocks.ids), device, self.recipe.seed, self.progress)

    def write_checkpoint(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Save the checkpoint; its weight files' bytes."""
        self.progress("save", 0, 1, self.out.name)
        with disk_errors(self.out), staged(self.out) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_checksums(staging)
            read_directory(staging)
        self.progress("save", 1, 1)
        return file_bytes(self.out)


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


def _recipe_yaml(recipe: Recipe) -> bytes:
    import yaml

    data = recipe.model_dump(exclude_none=True, include=_RECIPE_KEYS)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode()


def _check_whole(out: Path) -> None:
    try:
        read_directory(out)
    except CheckpointError as error:
        raise OutputError(
            f"the run is finished, but its checkpoint is damaged ({error}): prune anew with --fresh"
        ) from None
