"""Loading time and device memory of a saved checkpoint, compressed and dense."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cospadi.checkpoint import file_bytes, load, save
from cospadi.errors import OutputError
from cospadi.evaluation.speed.shapes import Subject, Variant
from cospadi.evaluation.speed.whole import allocated, parameter_bytes, random_model
from cospadi.runtime.memory import guard_memory

TURNS = 3


def measure_loading(
    subject: Subject,
    variant: Variant,
    device: torch.device,
    seed: int,
    out: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a dense and a compressed checkpoint of random weights, load them in turn, and remove them.

    The files were just written, so they are read from the page cache if memory suffices: this measures the work of
    loading, not the disk.

    Args:
        subject: the model.
        variant: how its groups are stored.
        device: where to load to.
        seed: of the weights.
        out: a directory with room for both; created if it does not exist.
        say: called with a description of each step.

    Returns:
        ``file_bytes``, ``device_bytes``, median ``seconds`` of plain ``from_pretrained``, and ``checked_seconds`` of
        `cospadi.load`, which also compares checksums; the same for the dense model, prefixed ``dense_``; and
        ``of_dense``, the ratio of the seconds.

    Raises:
        OutputError: if there is not enough room.
    """
    row: dict[str, Any] = {"shape": subject.name, "keep": variant.keep, "bits": variant.bits, "variant": variant.label}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".load-", dir=out) as scratch:
        folders = {"dense_": Path(scratch, "dense"), "": Path(scratch, "compressed")}
        for prefix, way in (("dense_", None), ("", variant)):
            say(f"writing {folders[prefix].name}")
            with guard_memory(f"writing a checkpoint of {subject.name}", "ask for fewer layers (--layers)"):
                model = random_model(subject, way, device, seed)
                _require_room(out, parameter_bytes(model))
                if way is None:
                    model.save_pretrained(folders[prefix])
                else:
                    save(model, None, folders[prefix], list(way.specs.values()))
            del model
            row[f"{prefix}file_bytes"] = file_bytes(folders[prefix])
        seconds: dict[str, list[float]] = {"dense_seconds": [], "seconds": [], "checked_seconds": []}
        for turn in range(TURNS):
            say(f"loading, {turn + 1} of {TURNS}")
            for prefix, folder in folders.items():
                taken, row[f"{prefix}device_bytes"] = timed_load(folder, device, False)
                seconds[f"{prefix}seconds"].append(taken)
            seconds["checked_seconds"].append(timed_load(folders[""], device, True)[0])
    row |= {name: median(times) for name, times in seconds.items()}
    return row | {"of_dense": row["seconds"] / row["dense_seconds"]}


def _require_room(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if free < 1.05 * size:
        raise OutputError(
            f"{out}: {free / 1e9:.1f} GB are free, but the checkpoint takes {size / 1e9:.1f} GB: free some space or "
            "ask for fewer layers (--layers)"
        )


def timed_load(folder: Path, device: torch.device, checked: bool) -> tuple[float, int | None]:
    """Load once; returns the seconds it took and the bytes on the device."""
    gc.collect()
    before = allocated(device)
    begin = time.perf_counter()
    place = None if device.type == "cpu" else {"": device}
    if checked:
        model = load(folder, device_map=place)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=place, local_files_only=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - begin
    after = allocated(device)
    del model
    return taken, None if after is None or before is None else after - before
