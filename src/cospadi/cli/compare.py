"""`cospadi compare`: methods compared at the same number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cospadi.api.lists import shares, words
from cospadi.cli.common import (
    BosOption,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OnlyOption,
    SamplesOption,
    SeedOption,
    TextFieldOption,
    UsageError,
    command_line,
    consoles,
    expand_home,
    local_path,
    parse_settings,
    print_json,
    quiet_transformers,
    split_paths,
    usage_errors,
)
from cospadi.errors import BudgetError

if TYPE_CHECKING:
    from rich.console import Console

    from cospadi.recipe import Recipe

TasksOption = Annotated[
    str | None,
    typer.Option(
        help="Task files (.jsonl), directories of them, or names of lm-eval tasks, separated by commas.",
        show_default=False,
        callback=split_paths,
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Number of examples per task.", show_default="all")]


def _options(settings: Iterable[str], methods: list[str]) -> dict[str, dict[str, Any]]:
    """``["pursuit.rho=3"]`` as ``{"pursuit": {"rho": 3}}``."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        method, dot, rest = setting.partition(".")
        if not dot or "=" in method or method not in methods:
            example = f"{methods[0] if methods else 'pursuit'}.rho=3"
            raise UsageError(
                f"--set {setting!r}: write METHOD.KEY=VALUE with one of the compared methods, for example {example}"
            )
        found.setdefault(method, {}).update(parse_settings([rest]))
    return found


def _recipes(values: Iterable[str]) -> tuple[Recipe | None, dict[str, Recipe]]:
    """The recipe that applies to all rows (a bare path), and recipes that add a row (``NAME=PATH``)."""
    from cospadi.recipe import Recipe

    common: Recipe | None = None
    named: dict[str, Recipe] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if equals:
            named[name] = Recipe.load(path)
        elif common is not None:
            raise UsageError(
                "--recipe PATH applies to all rows and can be given once; use --recipe NAME=PATH to add a row"
            )
        else:
            common = Recipe.load(value)
    return common, named


def _texts(paths: list[str]) -> dict[str, str]:
    """Texts by file name, or by path where two files share a name."""
    names = [Path(path).name for path in paths]
    return {name if names.count(name) == 1 else path: path for name, path in zip(names, paths, strict=True)}


def compare(
    model: ModelArgument,
    methods: Annotated[
        str | None, typer.Option(help="Methods separated by commas; `cospadi methods` lists them.", show_default=False)
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Shares of the linear layers' bytes to keep, separated by commas.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure perplexity on, as for --calibration; repeatable, rows are ranked by the first.",
            show_default=False,
            callback=expand_home,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the table, the plot and finished rows.",
            show_default=False,
            parser=local_path,
            metavar="PATH",
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A recipe for all rows, or with NAME= one that adds rows.",
            show_default=False,
            callback=expand_home,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="METHOD.KEY=VALUE", help="Set an option of a method; repeatable.", show_default=False
        ),
    ] = None,
    references: Annotated[
        str, typer.Option(help="Plain quantisers to include at 8, 4 and 3 bits, separated by commas, or none.")
    ] = "rtn",
    only: OnlyOption = None,
    calibration: CalibrationOption = None,
    text_field: TextFieldOption = None,
    samples: SamplesOption = None,
    seq_len: LengthOption = None,
    bos: BosOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    eval_seq_len: Annotated[int, typer.Option(min=2, help="Tokens per block when measuring perplexity.")] = 1024,
    max_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Measure only this many blocks from the start of each text.", show_default="all"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Blocks per batch.", show_default="by size")] = None,
    arithmetic: Annotated[
        Literal["float32", "model"], typer.Option(help="Measure in float32 or in the model's data type.")
    ] = "float32",
    tasks: TasksOption = None,
    limit: LimitOption = None,
    save: Annotated[bool, typer.Option("--save", help="Write each row's checkpoint to OUT/METHOD-KEEP.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard earlier rows in OUT.")] = False,
    json_: JsonOption = False,
) -> None:
    """Compare methods at the same number of bytes: table, CSV and plot. Finished rows are reused."""
    names = words(methods)
    common, named = _recipes(recipe or [])
    if not names and not named:
        raise UsageError("nothing to compare: pass --methods, for example --methods svd,pursuit")
    if not text:
        raise UsageError("no text to measure on: pass --text FILE")
    if [*text, calibration].count("-") > 1:
        raise UsageError("standard input can be read only once: pass - to one of --text and --calibration")
    if out is None:
        raise UsageError("no output directory given: pass --out DIR")
    with usage_errors():
        found = shares(keep, "--keep")
    if not found and (names or not all(of_row.keep for of_row in named.values())):
        raise UsageError("no size given: pass --keep, for example --keep 0.8,0.6")
    options = _options(set_ or [], names)

    from cospadi.api.measures import compare as run
    from cospadi.report import ProgressDisplay

    quiet_transformers()
    stdout, stderr = consoles()
    with ProgressDisplay(stderr) as display:
        data = run(
            model,
            out,
            methods=names,
            keep=found,
            text=_texts(text),
            recipe=common,
            recipes=named,
            options=options,
            references=references,
            only=only,
            calibration=calibration,
            text_field=text_field,
            samples=samples,
            seq_len=seq_len,
            bos=bos,
            device=device,
            seed=seed,
            eval_seq_len=eval_seq_len,
            max_blocks=max_blocks,
            batch=batch,
            arithmetic=arithmetic,
            tasks=tasks,
            limit=limit,
            save=save,
            fresh=fresh,
            progress=display.update,
            command=command_line(),
        )
    if json_:
        for line in data["warnings"]:
            stderr.print(f"warning: {line}", markup=False, soft_wrap=True)
        print_json(data)
    else:
        _print(data, out, stdout)
    if all(row.get("reason") for row in data["rows"]):
        raise BudgetError(f"no row could be produced: {data['rows'][0]['reason']}")


def printable(data: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with the task scores of both models in one table."""
    scores = {}
    for name, metrics in data.get("tasks", {}).items():
        scores[name] = {key: value for key, value in metrics.items() if key != "samples"}
        dense = data.get("dense_tasks", {}).get(name, {})
        scores[name] |= {f"{key}, against": value for key, value in dense.items() if key != "samples"}
    return data | {"tasks": scores}


def _print(data: dict[str, Any], out: Path, console: Console) -> None:
    from cospadi.report import print_comparison
    from cospadi.report.comparison import all_rows

    rows = all_rows(data)
    print_comparison([row for row in rows if not row.get("reason")], console, data["dense"])
    for row in rows:
        if row.get("reason"):
            size = "" if row["keep"] is None else f" at {row['keep']:g}"
            line = f"{row['method']}{size}: {row['reason']}"
            console.print(line, style="yellow", markup=False, soft_wrap=True)
    for line in data["warnings"]:
        console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"Perplexity on {data['text']}, measured {data['measured']}.", style="dim", markup=False)
    kinds = ",".join(data["files"])
    console.print(f"\nFiles: {out / 'comparison'}.{{{kinds}}}", markup=False, soft_wrap=True)


def register(app: typer.Typer) -> Callable[..., None]:
    """Add the command to the application."""
    return app.command()(compare)
