"""`cospadi compare`: methods beside each other at the same bytes, on one model, one text, one set of statistics.

Model, calibration tokens and statistics are read and collected once. A row is factorised, its weights are multiplied
out and measured in memory; checkpoints are written only when asked for. Finished rows lie in ``rows.jsonl``, each with
a fingerprint of all that its figures depend on, so that an interrupted comparison goes on and a comparison that gains
a method or a size computes only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cospadi.calibration import ACCEPTED, TextSource, TokenBlocks, described, read_texts, short_name, token_blocks
from cospadi.checkpoint import is_compressed
from cospadi.engine.journal import FOLDER, ROWS, check_output, held
from cospadi.engine.plan.plan import other_bytes
from cospadi.engine.plan.selection import chosen_modules, narrowed, restricted
from cospadi.engine.plan.text import needs_text
from cospadi.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    NumericalError,
    OutputError,
    RecipeError,
    ResourceError,
)
from cospadi.evaluation.comparison_row import Shared, compressed_row, pruned_row, workplace
from cospadi.evaluation.entries import Entry, make_entries
from cospadi.evaluation.tasks import find_tasks, require_lm_eval
from cospadi.evaluation.yardstick import ARITHMETIC, Yardstick
from cospadi.io import disk_errors, expanded
from cospadi.model_view import (
    InMemory,
    LinearGroup,
    Source,
    check_ids,
    check_length,
    check_weights,
    discover,
    kind_of,
    model_source,
    name_of,
    open_model,
    require_predictions,
)
from cospadi.progress import Progress, labelled, silent
from cospadi.pruning import get_pruning_method
from cospadi.recipe import Recipe
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions, weights_sha256
from cospadi.runtime.memory import memory_errors

UNSOLVED = (BudgetError, ModelError, NumericalError, RecipeError, ResourceError)
"""What may befall one row and leaves the others as they are."""


def compare(
    model: object,
    out: str | Path,
    *,
    tokenizer: object = None,
    methods: Sequence[str] = (),
    keeps: Sequence[float],
    text: TextSource | Mapping[str, TextSource],
    calibration: TextSource | None = None,
    recipe: Recipe | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    references: Sequence[str] = ("rtn",),
    seq_len: int = 1024,
    max_blocks: int | None = None,
    batch: int | None = None,
    arithmetic: str = "float32",
    tasks: Sequence[str] = (),
    limit: int | None = None,
    save: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Compress a model by several methods to several sizes and measure them all in the same way.

    Args:
        model: local directory, hub id, or a transformers model, which stays as it is.
        tokenizer: of a model in memory.
        out: directory for finished rows, and for checkpoints with `save`.
        methods: names of methods, and of pruning methods: these remove the fewest blocks (or the least width) within
            each keep.
        keeps: shares of the linear layers' 16-bit bytes.
        text: to measure perplexity on: whatever :func:`~cospadi.calibration.read_texts` takes, or several by name.
        calibration: the same; left out: the recipe's. Not needed where no row needs it.
        recipe: what holds for all rows: calibration (its ``bos`` and ``field`` also for measuring), device, seed and
            whatever else the methods share.
        options: options by method.
        recipes: further rows by name, each with the method and options of a recipe (and its keep, if it has one);
            their calibration, device and seed are those of `recipe`. One whose section ``prune`` has no size only
            prunes, to each keep.
        references: plain quantisers, drawn in at 8, 4 and 3 bits; those among `methods` are not run twice.
        seq_len: tokens per block of the measurement.
        max_blocks: only the first blocks of every text.
        batch: blocks at once.
        arithmetic: ``"float32"`` or ``"model"``, see :class:`~cospadi.evaluation.yardstick.Yardstick`.
        tasks: see :func:`~cospadi.evaluation.tasks.run_tasks`.
        limit: examples of every task.
        save: write every row's checkpoint to ``out/<method>-<keep>/``; references are only measured.
        fresh: forget earlier rows in `out`.
        progress: called as progress(phase, done, total, detail, error).
        command: the command line, for reports.

    Returns:
        ``dense``: figures of the model; ``rows``: one for every method and size, with ``method, keep, keep_actual,
        perplexity, bytes`` (compressed layers), ``bytes_before, total_bytes`` (all weights), ``seconds`` (to
        factorise), ``evaluate_seconds, error`` (relative output error on the calibration text), ``peak_memory_bytes,
        peak_device_bytes`` (of factorising, with the model), ``texts, tasks, warnings, directory``; a row that could
        not be made has ``reason`` and no perplexity. ``references``: rows of plain quantisation. ``measured``: how.
        ``warnings``: what to know before rows are compared.

    Raises:
        CospadiError: see `cospadi.errors`; what befalls a single row is told in its ``reason`` instead.
    """
    base = _base(recipe or Recipe(), calibration)
    entries = make_entries(base, methods, keeps, options or {}, recipes or {}, references)
    if base.calibration.source is None and any(map(_needs_text, entries)):
        raise CalibrationError(f"no calibration text: name {ACCEPTED}, with --calibration")
    if arithmetic not in ARITHMETIC:
        raise RecipeError(f"arithmetic {arithmetic!r} is unknown; use {' or '.join(ARITHMETIC)}")
    named = text if isinstance(text, Mapping) else {short_name(text): text}
    yardstick = Yardstick(
        texts={name: read_texts(source, field=base.calibration.field) for name, source in named.items()},
        seq_len=seq_len,
        max_blocks=max_blocks,
        batch=batch,
        arithmetic=arithmetic,
        tasks=tuple(tasks),
        limit=limit,
        seed=base.seed,
        bos=base.calibration.bos,
    )
    if not yardstick.texts:
        raise CalibrationError("nothing to measure on: pass --text")
    if tasks:
        find_tasks(tasks, limit)
        require_lm_eval()
    out = expanded(out)
    comparison = _Comparison(out, yardstick, save, progress or silent, command)
    with memory_errors(), comparison.opened(fresh):
        shared = _shared(model_source(model, tokenizer), base, entries, calibration, out, comparison.progress)
        return comparison.go(shared, base, entries)


def _base(recipe: Recipe, calibration: TextSource | None) -> Recipe:
    if calibration is not None:
        return recipe.merged({"calibration": {"source": described(calibration)}})
    return recipe


def _needs_text(entry: Entry) -> bool:
    if entry.only_prunes and entry.recipe.prune is not None:
        return get_pruning_method(entry.recipe.prune.method).text
    return needs_text(entry.recipe)


def _shared(
    source: Source,
    base: Recipe,
    entries: Sequence[Entry],
    calibration: TextSource | None,
    out: Path,
    progress: Progress,
) -> Shared:
    begun = time.perf_counter()
    progress("read", 0, 1, "model")
    require_predictions(kind_of(source), "a comparison", "use compress and your own measure")
    given = source if isinstance(source, InMemory) else None
    model, tokenizer = (given.model, given.tokenizer) if given else open_model(str(source))
    if is_compressed(model.config):
        raise ModelError(f"{source} is already compressed by cospadi: compare on the dense model")
    model = given.copied() if given else model
    wanted = base.calibration
    if wanted.source is not None:
        check_length(model, wanted.seq_len)
    view = discover(model)
    check_weights(view)
    view = restricted(view, {name for entry in entries for name in chosen_modules(view, entry.recipe)})
    blocks = TokenBlocks.none()
    if wanted.source is not None:
        texts = read_texts(calibration if calibration is not None else wanted.source, field=wanted.field)
        blocks = token_blocks(
            texts, tokenizer, samples=wanted.samples, seq_len=wanted.seq_len, seed=base.seed, bos=wanted.bos
        )
    check_ids(model, tokenizer, blocks.ids)
    progress("read", 1, 1)
    fingerprint = {"tokens": blocks.sha256, "model": weights_sha256(model)}
    return Shared(
        source=source,
        model=model,
        tokenizer=tokenizer,
        view=view,
        blocks=blocks,
        device=resolve_device(base.device),
        statistics=out
        / FOLDER
        / f"statistics-{_digest(fingerprint | {'of': view.module_names, 'seed': base.seed})[:12]}",
        fingerprint=fingerprint,
        seconds={"read": time.perf_counter() - begun},
    )


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Comparison:
    """Rows, made or found."""

    def __init__(self, out: Path, yardstick: Yardstick, save: bool, progress: Progress, command: str) -> None:
        self.out, self.yardstick, self.save = out, yardstick, save
        self.progress, self.command = progress, command
        self.found: dict[str, dict[str, Any]] = {}
        self.fresh = False

    @contextmanager
    def opened(self, fresh: bool) -> Iterator[None]:
        """Hold the output directory, and read what earlier runs left there."""
        check_output(self.out, comparison=True)
        self.fresh = fresh
        made = not self.out.exists()
        with disk_errors(self.out):
            lock = held(self.out)
        if lock is None:
            raise OutputError(f"another run is working in {self.out}: wait for it or choose another")
        with lock:
            if fresh:
                (self.out / ROWS).unlink(missing_ok=True)
            self.found = dict(read_rows(self.out / ROWS))
            try:
                yield
            except BaseException:
                if any(path.name != "lock" for path in (self.out / FOLDER).iterdir()) or self.found:
                    raise  # there is something to resume from
                shutil.rmtree(self.out / FOLDER, ignore_errors=True)
                if made:
                    with suppress(OSError):  # not empty: someone else put something there meanwhile
                        self.out.rmdir()
                raise
            shutil.rmtree(self.out / FOLDER, ignore_errors=True)

    def go(self, shared: Shared, base: Recipe, entries: Sequence[Entry]) -> dict[str, Any]:
        """Measure the dense model and every row."""
        common = self._common(shared)
        whole = discover(shared.model)
        chosen = {entry.method: chosen_modules(whole, entry.recipe) for entry in entries}
        same = len(set(chosen.values())) == 1
        modules = next(iter(chosen.values())) if same else whole.module_names
        groups = [narrowed(group, modules) for group in whole.groups]
        dense = self._once(common | {"row": "dense", "of": modules}, lambda: self._dense(shared, groups))
        rows: list[dict[str, Any]] = []
        references: list[dict[str, Any]] = []
        for number, entry in enumerate(entries, 1):
            label = f"{entry.slug} ({number}/{len(entries)})"
            (references if entry.keep is None else rows).append(self._row(entry, shared, common, label))
        return {
            "model": name_of(shared.source),
            "architecture": (shared.model.config.architectures or [type(shared.model).__name__])[0],
            "dense": dense,
            "rows": rows,
            "references": references,
            "measured": ARITHMETIC[self.yardstick.arithmetic],
            "warnings": [] if same else [_different(chosen, len(whole.module_names))],
            "text": next(iter(self.yardstick.texts)),
            "seq_len": self.yardstick.seq_len,
            "max_blocks": self.yardstick.max_blocks,
            "calibration": shared.blocks.facts,
            "seed": base.seed,
            "seconds": {phase: round(value, 3) for phase, value in shared.seconds.items()},
            "device": device_name(shared.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "command": self.command,
        }

    def _common(self, shared: Shared) -> dict[str, Any]:
        """What the figures of all rows depend on."""
        found = versions()
        return shared.fingerprint | {
            "yardstick": self.yardstick.fingerprint(),
            "device": shared.device.type,
            "versions": {name: found[name] for name in ("cospadi", "torch")},
        }

    def _once(self, fingerprint: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row of an earlier run, or a new one, which is durable before it is used."""
        digest = _digest(fingerprint)
        if digest not in self.found:
            self.found[digest] = make()
            append_row(self.out / ROWS, digest, self.found[digest])
        return self.found[digest]

    def _dense(self, shared: Shared, groups: Sequence[LinearGroup]) -> dict[str, Any]:
        begun = time.perf_counter()
        before = sum(group.dense_bytes for group in groups)
        figures = self.yardstick.measure(
            shared.model, shared.tokenizer, shared.device, labelled(self.progress, "dense")
        )
        return figures | {
            "bytes": before,
            "total_bytes": before + other_bytes(shared.model, groups),
            "evaluate_seconds": time.perf_counter() - begun,
        }

    def _row(self, entry: Entry, shared: Shared, common: dict[str, Any], label: str) -> dict[str, Any]:
        recipe = entry.recipe.model_dump(mode="json", exclude={"calibration", "device"})
        options = entry.recipe.prune.options if entry.only_prunes and entry.recipe.prune else entry.recipe.options
        head = {"method": entry.method, "keep": entry.keep, "options": options}
        fingerprint = common | {"row": recipe}
        directory = self.out / entry.slug
        save = self.save and entry.keep is not None
        if save and not (directory / "report.json").exists():
            self.found.pop(_digest(fingerprint), None)  # measured, but never written
        scratch = self.out / FOLDER / "rows" / f"{entry.slug}-{_digest(fingerprint)[:12]}"
        make = pruned_row if entry.only_prunes else compressed_row
        run = partial(
            make,
            shared,
            self.yardstick,
            entry.recipe,
            directory if save else scratch,
            keep=save,
            fresh=self.fresh,
            command=self.command,
            progress=labelled(self.progress, label),
        )
        try:
            with workplace(scratch):
                row = head | self._once(fingerprint, run)
        except UNSOLVED as error:
            return head | {"perplexity": None, "bytes": None, "seconds": None, "reason": str(error)}
        if entry.keep is None:
            row["keep"] = round(row["keep_actual"], 4)
        return row | ({"directory": entry.slug} if save else {})


def _different(chosen: Mapping[str, Sequence[str]], count: int) -> str:
    """What to know where rows compress different layers.

    Args:
        chosen: names of the linear layers by method.
        count: of all linear layers.
    """
    by_size: dict[tuple[str, ...], list[str]] = {}
    for method, modules in chosen.items():
        by_size.setdefault(tuple(modules), []).append(method)
    told = "; ".join(f"{', '.join(names)}: {len(modules)} of {count}" for modules, names in by_size.items())
    return (
        f"not all rows compress the same linear layers ({told}), and keep counts against those of its row: "
        "give --only, such as --only self_attn, or compare the bytes of the whole model"
    )


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Finished rows by fingerprint; a line that an interruption cut off is no row."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            yield entry["fingerprint"], entry["row"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue


def append_row(path: Path, fingerprint: str, row: Mapping[str, Any]) -> None:
    """Add a row that survives whatever comes next.

    Raises:
        OutputError: if the disk is full or cannot be written.
    """
    with disk_errors(path.parent), path.open("a+b") as file:
        # After a line that was cut off, a new one begins.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps({"fingerprint": fingerprint, "row": row}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
