"""`evaluate`, `compare` and `benchmark`: quality and speed, with progress and files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cospadi import evaluation
from cospadi.api.directories import check_new_directory
from cospadi.api.lists import Words, shares, token_counts, ways, words
from cospadi.api.runs import AnyRecipe, Bos, Model, Tokenizer
from cospadi.calibration import TextSource
from cospadi.engine.inputs import given_text
from cospadi.errors import RecipeError
from cospadi.evaluation.speed import Settings, run_benchmark
from cospadi.io import expanded
from cospadi.options import recipe_from
from cospadi.recipe import Recipe
from cospadi.report import write_all
from cospadi.report.comparison import write_comparison
from cospadi.report.depth import write_depth
from cospadi.report.progress import ProgressOption, showing
from cospadi.report.results import Comparison, Evaluation, Speed
from cospadi.report.speed import write_numbers, write_speed


def evaluate(
    model: Model,
    *,
    tokenizer: Tokenizer = None,
    text: TextSource | None = None,
    text_field: str | None = None,
    tasks: Words = (),
    limit: int | None = None,
    against: Model | None = None,
    seq_len: int = 1024,
    max_blocks: int | None = None,
    batch: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    progress: ProgressOption = "auto",
) -> Evaluation:
    """Measure perplexity and task scores of a checkpoint and, optionally, of a second one.

    Args:
        model: any checkpoint that transformers can load, or a transformers model, which stays as it is.
        tokenizer: of models in memory: the tokenizer, or where to read it.
        text: a file, a directory, a hub data set, or documents in memory such as a list, a generator or a ``Dataset``;
            several documents are joined by the end token.
        text_field: field of the records that holds the text or messages; left out: ``text``, ``messages``, or
            ``prompt`` and ``completion``.
        tasks: task files, directories of them, or names of lm-eval tasks: a list, or text with commas.
        limit: number of examples per task.
        against: a second model, usually the dense one.
        seq_len: tokens per block.
        max_blocks: evaluate at most this many blocks from the start.
        batch: blocks per batch.
        bos: whether blocks and examples begin with the BOS token: ``auto`` (where the tokenizer adds it), ``on`` or
            ``off``.
        device: where the models run; with ``auto``, a model in memory runs where it is.
        progress: as for :func:`cospadi.compress`.

    Returns:
        a dictionary that shows itself briefly: ``bos``; with a text ``perplexity, tokens, bits_per_byte,
        word_perplexity, begins_with``; with tasks ``tasks`` and ``harness``; ``bytes`` (of the weight files); and, with
        `against`, the same keys prefixed by ``dense_``.

    Raises:
        CalibrationError: if there is no usable text or task.
        ResourceError: if tasks are given and lm-eval is not installed.
    """
    with showing(progress) as reporting:
        return Evaluation(
            evaluation.evaluate(
                model,
                tokenizer=tokenizer,
                text=text,
                text_field=text_field,
                tasks=words(tasks),
                limit=limit,
                against=against,
                seq_len=seq_len,
                max_blocks=max_blocks,
                batch=batch,
                bos=bos,
                device=device,
                progress=reporting,
            )
        )


def compare(
    model: Model,
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer = None,
    methods: Words = (),
    keep: Words = (),
    text: TextSource | Mapping[str, TextSource],
    recipe: AnyRecipe = None,
    recipes: Mapping[str, AnyRecipe] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    references: Words = "rtn",
    only: str | Sequence[str] | None = None,
    calibration: TextSource | dict[str, Any] | None = None,
    text_field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    bos: Bos | None = None,
    device: Any = None,
    seed: int | None = None,
    eval_seq_len: int = 1024,
    max_blocks: int | None = None,
    batch: int | None = None,
    arithmetic: Literal["float32", "model"] = "float32",
    tasks: Words = (),
    limit: int | None = None,
    save: bool = False,
    fresh: bool = False,
    progress: ProgressOption = "auto",
    command: str = "",
) -> Comparison:
    """Compress a model by several methods to several sizes, measure all in the same way, and write table and plot.

    Finished rows are reused: a comparison that gains a method or a size computes only what is new.

    Args:
        model: local directory, hub id, or a transformers model, which stays as it is.
        out: directory for the table (CSV, JSON, HTML), the plot and finished rows.
        tokenizer: of a model in memory: the tokenizer, or where to read it.
        methods: names of methods and of pruning methods: a list, or text with commas.
        keep: shares of the linear layers' bytes to keep: numbers, or text such as ``"0.8,60%"``.
        text: to measure perplexity on: what `calibration` may be, or several of these by name; rows are ranked by the
            first.
        recipe: what holds for all rows; the other arguments override it.
        recipes: further rows by name.
        options: options by method, such as ``{"pursuit": {"rho": 3}}``.
        references: plain quantisers to include at 8, 4 and 3 bits; empty for none.
        only: compress only these modules: names or patterns.
        calibration: a file, a directory, a hub data set, or documents in memory such as a list, a generator or a
            ``Dataset``; or the section ``calibration`` of a recipe. Not needed where no row reads it.
        text_field: field of the records that holds the text or messages, of `text`, too; left out: ``text``,
            ``messages``, or ``prompt`` and ``completion``.
        samples: number of calibration sequences.
        seq_len: tokens per calibration sequence.
        bos: whether sequences begin with the BOS token, also when measuring: ``auto`` (where the tokenizer adds it),
            ``on`` or ``off``.
        device: where to compute.
        seed: of every random choice.
        eval_seq_len: tokens per block when measuring perplexity.
        max_blocks: measure only this many blocks from the start of each text.
        batch: blocks per batch.
        arithmetic: measure in float32 or in the model's data type.
        tasks: task files, directories of them, or names of lm-eval tasks.
        limit: number of examples per task.
        save: write each row's checkpoint to ``out/METHOD-KEEP``.
        fresh: forget earlier rows in `out`.
        progress: as for :func:`cospadi.compress`.
        command: the command line, for the record.

    Returns:
        a dictionary that shows itself briefly: ``dense``, ``rows`` and ``references`` with ``method, keep, keep_actual,
        perplexity, bytes, total_bytes, seconds, error`` each (a row that could not be made has ``reason``);
        ``warnings``; ``files``: names in `out` by kind.

    Raises:
        CospadiError: see `cospadi.errors`; what befalls a single row is told in its ``reason`` instead.
    """
    folder = expanded(out)
    texts, section = given_text(calibration)
    flags: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "text_field": text_field, "bos": bos}
    flags |= {"calibration": section, "only": only, "device": device, "seed": seed}
    plain = words(references)
    with showing(progress) as reporting:
        data = evaluation.compare(
            model,
            folder,
            tokenizer=tokenizer,
            methods=words(methods),
            keeps=shares(keep),
            text=text,
            calibration=texts,
            recipe=recipe_from(recipe, flags),
            options=options,
            recipes={name: Recipe.of(row) for name, row in (recipes or {}).items()},
            references=[] if plain == ["none"] else plain,
            seq_len=eval_seq_len,
            max_blocks=max_blocks,
            batch=batch,
            arithmetic=arithmetic,
            tasks=words(tasks),
            limit=limit,
            save=save,
            fresh=fresh,
            progress=reporting,
            command=command,
        )
    files = write_comparison(data, folder)
    if save:
        _write_pages(data, folder)
    return Comparison(data | {"files": {kind: path.name for kind, path in files.items()}})


def _write_pages(data: dict[str, Any], out: Path) -> None:
    """Write report page and model card next to every checkpoint, including the measurements."""
    for row in data["rows"]:
        if row.get("directory"):
            folder = out / row["directory"]
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            keys = ("perplexity", "tasks")
            dense = {f"dense_{key}": data["dense"].get(key) for key in keys}
            report["evaluation"] = {"text": data["text"], **{key: row.get(key) for key in keys}, **dense}
            (write_depth if "distances" in report else write_all)(report, folder)


def benchmark(
    model: str | os.PathLike[str] | None = None,
    *,
    shapes: Words = (),
    keep: Words = (0.6, 0.4),
    bits: Words = (16, 8),
    tokens: Words = (),
    layers: int | None = None,
    prompt: int | None = None,
    products: bool = True,
    whole: bool = True,
    load: bool = False,
    quick: bool = False,
    compile: bool = False,
    jobs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: ProgressOption = "auto",
    command: str = "",
) -> Speed:
    """Measure compressed layers and models, with random weights, against dense ones and rivals of equal size.

    Args:
        model: a model whose shapes are used, or a compressed checkpoint, which is measured as stored.
        shapes: instead: ``llama-3-8b``, ``llama-3.2-1b``, ``qwen3-8b``, ``smollm2-135m``; the first also as a whole
            model.
        keep: shares of bytes to keep; ``"0.4:8"`` is 0.4 with 8 bits only.
        bits: of the factors: 16, 8, 4, 3, 2.
        tokens: numbers of tokens; empty: a default for the device.
        layers: number of decoder layers of the whole model; None: all.
        prompt: tokens in the prefill of the whole model; None: a default for the device.
        products: measure single groups of layers.
        whole: measure a whole model.
        load: also write checkpoints to `out`, time loading them, and remove them.
        quick: one shape, two numbers of tokens, fewer rounds.
        compile: run whole models, dense and compressed, through ``torch.compile``.
        jobs: processes that compile kernels first (GPU); None: one per core, up to 14.
        out: new directory for the numbers and the plot.
        device: where to measure.
        seed: of weights and inputs.
        progress: as for :func:`cospadi.compress`.
        command: the command line, for the record.

    Returns:
        a dictionary that shows itself briefly: ``layers``, ``models``, ``loading``: rows with times in microseconds or
        milliseconds and their ratios to dense; ``device``, ``versions``, ``settings``; ``files``: names in `out` by
        kind.

    Raises:
        RecipeError: if an option has no such value.
        ModelError: if the configuration of the model cannot be used.
        BudgetError: if a keep is too small for a layer.
        NumericalError: if a kernel computes wrong results.
        ResourceError: if memory does not suffice.
    """
    if model is not None and words(shapes):
        raise RecipeError("both a model and shapes are given: give one of them")
    if load and out is None:
        raise RecipeError("load writes temporary checkpoints: name a directory for them with out")
    settings = Settings(
        model=None if model is None else os.fspath(model),
        shapes=tuple(words(shapes)),
        ways=ways(keep, bits),
        tokens=token_counts(tokens),
        layers=layers,
        prompt=prompt,
        products=products,
        whole=whole,
        load=load,
        quick=quick,
        jobs=jobs or 0,
        compile=compile,
        device=device,
        seed=seed,
    )
    folder = None if out is None else expanded(out)
    if folder is not None:
        check_new_directory(folder)

    def keep_partial(found: dict[str, Any]) -> None:
        if folder is not None:
            write_numbers(found, folder)

    with showing(progress) as reporting:
        data = run_benchmark(settings, out=folder, command=command, progress=reporting, partial=keep_partial)
    files = [] if folder is None else write_speed(data, folder)
    return Speed(data | {"files": {path.suffix.removeprefix("."): path.name for path in files}})
