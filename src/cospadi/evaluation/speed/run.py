"""A complete benchmark of layers, whole models and loading; the result is one dictionary of plain numbers."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import ResourceError
from cospadi.evaluation.speed.layers import DTYPE, Bench, measure_layers
from cospadi.evaluation.speed.loading import measure_loading
from cospadi.evaluation.speed.shapes import (
    METHOD,
    Subject,
    Variant,
    anonymous,
    bitmask,
    first_of_shape,
    low_rank,
    named_shape,
    of_model,
    shape_of,
    variants,
)
from cospadi.evaluation.speed.timing import CACHES_OVER, cache_bytes, copy_bandwidth
from cospadi.evaluation.speed.whole import CACHE_TOKENS, SEEN_TOKENS, measure_model
from cospadi.format import GroupSpec
from cospadi.progress import Progress, silent
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions

Results = dict[str, Any]

ROUNDS, QUICK_ROUNDS = 11, 5
PROMPT = 2048


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: a model directory or hub id whose configuration is used; None: `shapes`.
        shapes: names of :data:`~cospadi.evaluation.speed.shapes.SHAPES`; the first is also measured as a whole model.
            Empty: a default for the device.
        ways: pairs of the share of bytes to keep and the bits of dictionary and values; ignored for a compressed
            checkpoint.
        tokens: numbers of rows of x. Empty: a default for the device.
        layers: decoder layers of the whole model; None for all.
        prompt: tokens of a prefill. None: a default for the device.
        products: measure single groups of layers.
        whole: measure the whole model.
        load: also write and load checkpoints.
        quick: use fewer shapes, tokens and rounds by default.
        jobs: processes that compile kernels before anything is timed; 0: one per core, at most 14.
        compile: run whole models, dense and compressed, through ``torch.compile``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of weights and inputs.
    """

    model: str | None = None
    shapes: tuple[str, ...] = ()
    ways: tuple[tuple[float, int], ...] = ((0.6, 16), (0.6, 8), (0.4, 16), (0.4, 8))
    tokens: tuple[int, ...] = ()
    layers: int | None = None
    prompt: int | None = None
    products: bool = True
    whole: bool = True
    load: bool = False
    quick: bool = False
    jobs: int = 0
    compile: bool = False
    device: str = "auto"
    seed: int = 0

    def filled(self, device: torch.device) -> Settings:
        """A copy in which empty fields have the defaults for the device."""
        gpu = device.type == "cuda"
        shapes = ("llama-3-8b", "llama-3.2-1b", "qwen3-8b") if gpu else ("smollm2-135m",)
        tokens = (1, 4, 16, 2048) if gpu else (1, 16, 256)
        return replace(
            self,
            shapes=() if self.model else self.shapes or (shapes[:1] if self.quick else shapes),
            tokens=self.tokens or ((1, tokens[-1]) if self.quick else tokens),
            prompt=self.prompt or (PROMPT if gpu else 256),
        )


def run_benchmark(
    settings: Settings,
    *,
    out: Path | None = None,
    command: str = "",
    progress: Progress | None = None,
    partial: Callable[[Results], None] = lambda _: None,
) -> Results:
    """Measure the speed of compressed layers and models on this machine.

    All weights are random. Dense layers are bfloat16 products of PyTorch; ``low_rank`` is two of them, and ``bitmask``
    an unstructured mask over an identity dictionary, both within the bytes of our factors.

    Args:
        settings: what to measure.
        out: a directory for the checkpoints of `settings.load`.
        command: the command line, for the record.
        progress: called with the phase, the steps done, the number of steps and a detail.
        partial: called with the results so far after every step.

    Returns:
        ``device``, ``cpu``, ``versions``, ``command``, ``seed``, ``settings``, ``copy_bytes_per_second``; ``layers``:
        one row per shape, keep, bits and number of tokens, with ``us``, ``dense_us``, ``low_rank_us``, ``bitmask_us``
        (microseconds), ``…of_dense`` (median ratios of times), ``bytes_per_second``, ``of_copy`` and ``error``;
        ``models``: one row per variant; ``loading``: one row per variant; ``kernels``: the kernel chosen for each
        product.

    Raises:
        RecipeError: if a shape or device is unknown.
        ModelError: if the configuration of the model cannot be used.
        BudgetError: if a keep is too small for a layer.
        NumericalError: if a kernel computes wrong results.
        ResourceError: if memory does not suffice.
    """
    device = resolve_device(settings.device)
    settings = settings.filled(device)
    report = progress or silent
    layers = settings.layers
    subjects = (
        [of_model(settings.model, layers)] if settings.model else [named_shape(n, layers) for n in settings.shapes]
    )
    ways = {subject.name: variants(subject, settings.ways) for subject in subjects}
    torch.manual_seed(settings.seed)
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if device.type == "cuda":
            report("compile", 0, 1, "")
            compile_kernels(settings, subjects, ways)
        report("copy", 0, 1, "")
        bench = Bench(device, rounds, settings.seed, copy_bandwidth(device, rounds))
        results = _header(settings, device, command) | {"copy_bytes_per_second": bench.copied}
        results |= {"rounds": rounds, "layers": [], "models": [], "loading": []}
        first = subjects[0]
        total = len({(shape_of(g), w.keep) for s in subjects for g in s.groups for w in ways[s.name]})
        measured = measure_layers(subjects, bench, ways, settings.tokens) if settings.products else iter(())
        for done, rows in enumerate(measured, 1):
            results["layers"] += rows
            report("layers", done, total, rows[0]["group"])
            partial(_with_kernels(results, device))
        steps = len(ways[first.name]) + 1
        if settings.whole:
            counted = iter(range(steps))
            say = lambda label: report("model", next(counted), steps, label)  # noqa: E731
            for row in measure_model(first, ways[first.name], bench, settings.prompt or PROMPT, say, settings.compile):
                results["models"].append(row)
                partial(_with_kernels(results, device))
            report("model", steps, steps, "")
        if settings.load:
            if out is None:
                raise ResourceError("measuring loading needs a directory for checkpoints: name one with --out DIR")
            for way in ways[first.name][:1]:
                say = lambda label: report("load", 0, 1, label)  # noqa: E731
                results["loading"].append(measure_loading(first, way, device, settings.seed, out, say))
            report("load", 1, 1, "")
    return _with_kernels(results, device)


def compile_kernels(settings: Settings, subjects: Sequence[Subject], ways: dict[str, list[Variant]]) -> None:
    """Compile the kernels of everything that will be timed, in parallel processes."""
    from cospadi.kernels.precompile import compile_ahead

    groups: dict[GroupSpec, set[int]] = {}
    for subject in subjects:
        for group in first_of_shape(subject).values() if settings.products else ():
            specs = [spec for way in ways[subject.name] if (spec := way.of(group)) is not None]
            rivals = [made for spec in specs for make in (low_rank, bitmask) if (made := make(group, spec.bytes))]
            for spec in specs + rivals:
                groups.setdefault(anonymous(spec), set()).update(settings.tokens)
        for way in ways[subject.name] if settings.whole and subject is subjects[0] else ():
            for spec in way.specs.values():
                groups.setdefault(anonymous(spec), set()).update({1, settings.prompt or PROMPT})
    products = [
        (matrix, count, reader)
        for spec, counts in groups.items()
        for count in counts
        for matrix, reader in ((spec.dictionary, spec.codes), (spec.codes, None))
        if matrix is not None
    ]
    compile_ahead(products, DTYPE, jobs=settings.jobs)


def _header(settings: Settings, device: torch.device, command: str) -> Results:
    found = versions()
    found |= {"cuda": torch.version.cuda or "–"}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "–"
    return {
        "device": device_name(device),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": found,
        "command": command,
        "seed": settings.seed,
        "settings": {
            "model": settings.model, "shapes": list(settings.shapes), "ways": [list(way) for way in settings.ways],
            "tokens": list(settings.tokens), "layers": settings.layers,
            "prompt": settings.prompt, "quick": settings.quick, "compile": settings.compile,
        },
        "method": METHOD,
        "cache_bytes": cache_bytes(device),
        "rotated_bytes": CACHES_OVER[device.type] * cache_bytes(device),
        "decode": {"cache_tokens": CACHE_TOKENS, "seen_tokens": SEEN_TOKENS},
    }  # fmt: skip


def _with_kernels(results: Results, device: torch.device) -> Results:
    """The results with the kernels chosen so far."""
    if device.type != "cuda":
        return results
    from cospadi.kernels import autotune

    return results | {"kernels": {str(key): name for key, name in autotune.choices().items()}}
