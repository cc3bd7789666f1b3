"""The typer application: one function per command."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from cospadi.cli.benchmark import register as register_benchmark
from cospadi.cli.common import (
    TEXT_HELP,
    AllocationOption,
    AnchorOption,
    BosOption,
    CalibrationOption,
    DeviceOption,
    DirArgument,
    DropExtraOption,
    GramOption,
    GroupingOption,
    JsonOption,
    KeepOption,
    LengthOption,
    MethodOption,
    ModelArgument,
    OnlyOption,
    OutArgument,
    RecipeOption,
    RefineOption,
    SamplesOption,
    SeedOption,
    SequentialOption,
    SetOption,
    SizeOption,
    TextFieldOption,
    UsageError,
    command_line,
    consoles,
    expand_home,
    make_recipe,
    print_json,
    quiet_transformers,
)
from cospadi.cli.compare import LimitOption, TasksOption, printable, register
from cospadi.cli.demo import register as register_demo
from cospadi.cli.prune import register as register_prune

app = typer.Typer(
    name="cospadi",
    help="Compress a trained language model without retraining it.",
    epilog="Every command accepts --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FloatName = Literal["auto", "bfloat16", "float16", "float32"]
TextOption = Annotated[
    str | None,
    typer.Option(
        help=f"Text to measure perplexity on: {TEXT_HELP}",
        show_default=False,
        callback=expand_home,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from cospadi import __version__

        print(f"cospadi {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress a trained language model without retraining it."""


@app.command()
def compress(
    model: ModelArgument,
    out: OutArgument,
    keep: KeepOption = None,
    target_size: SizeOption = None,
    method: MethodOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    grouping: GroupingOption = None,
    allocation: AllocationOption = None,
    only: OnlyOption = None,
    sequential: SequentialOption = None,
    gram: GramOption = None,
    anchor: AnchorOption = None,
    refine: RefineOption = None,
    drop_extra: DropExtraOption = None,
    calibration: CalibrationOption = None,
    text_field: TextFieldOption = None,
    samples: SamplesOption = None,
    seq_len: LengthOption = None,
    bos: BosOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in OUT.")] = False,
    json_: JsonOption = False,
) -> None:
    """Compress a model. After an interruption, the same command resumes the run."""
    merged = make_recipe(
        recipe,
        settings=set_,
        calibration=calibration,
        text_field=text_field,
        samples=samples,
        seq_len=seq_len,
        bos=bos,
        keep=keep,
        target_size=target_size,
        method=method,
        grouping=grouping,
        allocation=allocation,
        only=only,
        sequential=sequential,
        gram=gram,
        anchor=anchor,
        refine=refine,
        drop_extra=drop_extra,
        device=device,
        seed=seed,
    )
    if dry_run:
        _print_estimate(model, merged, json_, rehearse=True)
        return
    from cospadi.api.runs import compress as run
    from cospadi.report import ProgressDisplay, print_summary

    quiet_transformers()
    stdout, stderr = consoles()
    with ProgressDisplay(stderr) as display:
        result = run(model, out, recipe=merged, fresh=fresh, progress=display.update, command=command_line())
    report, groups = result.report, len(result.report["groups"])
    if result.complete:
        stderr.print(
            Text(f"{out} is already complete and was not changed; pass --fresh to compress again"), soft_wrap=True
        )
    elif result.resumed:
        stderr.print(f"resumed: {result.resumed} of {groups} groups were already finished")
    if json_:
        for line in report["warnings"]:
            stderr.print(Text(f"warning: {line}"), soft_wrap=True)
        print_json(report | {"out": str(out)})
        return
    print_summary(report, stdout)
    hints = f"\nReport: {out / 'report.html'}"
    if report.get("generates", True):
        hints += f'\nTry:    cospadi generate {shlex.quote(str(out))} --prompt "Once upon a time"'
    stdout.print(Text(hints), soft_wrap=True)


def _print_estimate(model: str, merged: Any, json_: bool, *, rehearse: bool = False) -> None:
    from cospadi.api.runs import estimate as run
    from cospadi.report import print_estimate

    quiet_transformers()
    data = run(model, merged, rehearse=rehearse).to_dict()
    if json_:
        print_json(data)
    else:
        print_estimate(data, consoles()[0])


@app.command()
def estimate(
    model: ModelArgument,
    keep: KeepOption = None,
    target_size: SizeOption = None,
    method: MethodOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    grouping: GroupingOption = None,
    allocation: AllocationOption = None,
    only: OnlyOption = None,
    sequential: SequentialOption = None,
    gram: GramOption = None,
    anchor: AnchorOption = None,
    refine: RefineOption = None,
    samples: SamplesOption = None,
    seq_len: LengthOption = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Estimate sizes, memory and time from the model's configuration alone."""
    merged = make_recipe(
        recipe,
        settings=set_,
        samples=samples,
        seq_len=seq_len,
        keep=keep,
        target_size=target_size,
        method=method,
        grouping=grouping,
        allocation=allocation,
        only=only,
        sequential=sequential,
        gram=gram,
        anchor=anchor,
        refine=refine,
        device=device,
    )
    _print_estimate(model, merged, json_)


@app.command()
def inspect(
    directory: DirArgument,
    json_: JsonOption = False,
) -> None:
    """Show the contents of a checkpoint (groups or tensors, bytes, errors) and verify every file."""
    from cospadi.api.checkpoints import inspect as run
    from cospadi.report import print_inspect

    data = run(directory)
    if json_:
        print_json(data)
    else:
        print_inspect(data, consoles()[0])


@app.command()
def evaluate(
    directory: DirArgument,
    text: TextOption = None,
    text_field: TextFieldOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A second model to measure in the same way, usually the original.",
            show_default=False,
            callback=expand_home,
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per block.")] = 1024,
    max_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Measure only this many blocks from the start of the text.", show_default="all"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Blocks per batch.", show_default="by size")] = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    bos: BosOption = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure perplexity and task scores of any checkpoint that transformers can load."""
    if text is None and not tasks:
        raise UsageError("nothing to evaluate: pass --text FILE or --tasks FILE")
    from cospadi.api.measures import evaluate as run
    from cospadi.report import ProgressDisplay, print_evaluation

    quiet_transformers()
    stdout, stderr = consoles()
    with ProgressDisplay(stderr) as display:
        data = run(
            directory,
            text=text,
            text_field=text_field,
            tasks=tasks,
            limit=limit,
            against=against,
            seq_len=seq_len,
            max_blocks=max_blocks,
            batch=batch,
            device=device or "auto",
            bos=bos or "auto",
            progress=display.update,
        )
    if json_:
        print_json(data)
    else:
        print_evaluation(printable(data), stdout)


register(app)
register_prune(app)
register_benchmark(app)


@app.command()
def generate(
    directory: DirArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    bos: BosOption = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Generate text with a checkpoint."""
    from cospadi.api.checkpoints import generate as run

    quiet_transformers()
    stdout, stderr = consoles()
    data = run(
        directory,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device or "auto",
        bos=bos or "auto",
    )
    if json_:
        print_json(data)
        return
    stdout.print(Text.assemble((prompt, "bold"), data["text"]), soft_wrap=True)
    stderr.print(f"{data['tokens']} tokens, {data['tokens_per_second']:.1f} tokens/s", style="dim")


@app.command()
def export(
    directory: DirArgument,
    out: OutArgument,
    dense: Annotated[bool, typer.Option("--dense", help="Write a stock checkpoint.")] = False,
    dtype: Annotated[FloatName, typer.Option(help="Data type of the exported weights.")] = "auto",
    json_: JsonOption = False,
) -> None:
    """Export a checkpoint. With --dense the result loads without cospadi; factors are multiplied out."""
    if not dense:
        raise UsageError("no export format given: pass --dense for a stock checkpoint")
    from cospadi.api.checkpoints import export as run
    from cospadi.report.text import human_bytes

    quiet_transformers()
    data = run(directory, out, dtype=dtype)
    if json_:
        print_json(data)
    else:
        line = f"{data['out']}: a stock checkpoint of {human_bytes(data['file_bytes'])}"
        consoles()[0].print(Text(line), soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show only this method.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the methods and their options."""
    if schema:
        from cospadi.recipe import json_schema

        print(json_schema())
        return
    from cospadi.cli.listing import method_table, methods_data

    data = methods_data(name)
    if json_:
        print_json(data)
    else:
        consoles()[0].print(method_table(data))


@app.command()
def doctor(json_: JsonOption = False) -> None:
    """Check the installation: versions, devices, optional packages, and a tiny run."""
    from cospadi.api.checkpoints import doctor as run
    from cospadi.cli.listing import doctor_table

    data = run()
    if json_:
        print_json(data)
    else:
        consoles()[0].print(doctor_table(data))
    if not data["healthy"]:
        raise typer.Exit(1)


register_demo(app)
