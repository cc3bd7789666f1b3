"""What a run leaves: the checkpoint, and what the report says of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.checkpoint import file_bytes, format_for, save
from cospadi.checkpoint.checksums import write_checksums
from cospadi.checkpoint.headers import Entry, read_directory
from cospadi.checkpoint.publish import staged
from cospadi.checkpoint.write import write_model
from cospadi.engine.journal import Journal
from cospadi.engine.plan.plan import Plan
from cospadi.io import disk_errors, write_durably
from cospadi.progress import Progress
from cospadi.runtime.devices import device_name
from cospadi.runtime.fingerprints import versions
from cospadi.runtime.memory import peak_memory


class Output:
    """A checkpoint that a run writes.

    Args:
        out: the output directory.
        progress: called as progress(phase, done, total, detail, error).
    """

    def __init__(self, out: Path, progress: Progress) -> None:
        self.out, self.progress = out, progress
        self.extra: Mapping[str, Entry] = {}
        """Stored tensors of the original that its class does not take; they are copied."""
        self.copied: list[str] = []
        """Names of the files that were copied from the model's directory."""

    def facts(self) -> dict[str, Any]:
        """What the report says of the files."""
        return {"file_bytes": file_bytes(self.out), "copied_files": self.copied}


class Checkpoint(Output):
    """Writes the checkpoint of a compressed model."""

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, journal: Journal) -> None:
        """Put the finished groups of the journal into the model and write the checkpoint."""
        self.progress("save", 0, 1, self.out.name)
        stored = format_for(plan.specs)
        stored.replace(model, plan.specs)
        for index, spec in enumerate(plan.specs):
            with journal.groups.checked(index):
                stored.install(model, spec, journal.groups.read(index)[0])
        with disk_errors(self.out):
            self.copied = save(model, tokenizer, self.out, plan.specs, extra=self.extra)
        self.progress("save", 1, 1)


class PrunedCheckpoint(Output):
    """Writes the checkpoint of a pruned model."""

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the checkpoint."""
        self.progress("save", 0, 1, self.out.name)
        with disk_errors(self.out), staged(self.out) as staging:
            self.copied = write_model(model, tokenizer, staging, extra=self.extra)
            write_checksums(staging)
            read_directory(staging)
        self.progress("save", 1, 1)


def environment(device: torch.device) -> dict[str, Any]:
    """What every report says of the machine and the moment; call it when the work is done."""
    memory = peak_memory()
    return {
        "peak_memory_bytes": memory["host"],
        "peak_device_bytes": memory.get("device"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def write_report(out: Path, recipe_yaml: str, report: dict[str, Any]) -> None:
    """Write recipe and report. The report is last: where it is, the run is done."""
    write_durably(out / "recipe.yaml", recipe_yaml.encode())
    write_durably(out / "report.json", (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())
