"""`cospadi prune`: remove decoder layers, or part of their width, without retraining."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cospadi.cli.common import (
    BosOption,
    CalibrationOption,
    DeviceOption,
    DropExtraOption,
    JsonOption,
    KeepBlocksOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    RecipeOption,
    SamplesOption,
    SeedOption,
    SetOption,
    TextFieldOption,
    UsageError,
    command_line,
    consoles,
    parse_settings,
    print_json,
    quiet_transformers,
)

if TYPE_CHECKING:
    from cospadi.recipe import Recipe


def prune(
    model: ModelArgument,
    out: OutArgument,
    method: Annotated[
        str | None,
        typer.Option(
            help="replaceme, uidl, shortgpt, sleb, laco, llm_streamline, slicegpt, llm_pruner, magnitude, random, or a "
            "plug-in's; see `cospadi methods`.",
            show_default="replaceme",
        ),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Number of blocks (decoder layers) to remove.", show_default=False)
    ] = None,
    keep_blocks: KeepBlocksOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    drop_extra: DropExtraOption = None,
    calibration: CalibrationOption = None,
    text_field: TextFieldOption = None,
    samples: SamplesOption = None,
    seq_len: LengthOption = None,
    bos: BosOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resulting sizes and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in OUT.")] = False,
    json_: JsonOption = False,
) -> None:
    """Remove whole decoder layers (depth) or part of their width. Depth methods write stock checkpoints."""
    if blocks is not None and keep_blocks is not None:
        raise UsageError("--blocks and --keep-blocks exclude each other: give one of them")
    merged = _recipe(
        recipe,
        {
            "method": method,
            "blocks": blocks,
            "keep_blocks": keep_blocks,
            "options": parse_settings(set_) or None,
            "drop_extra": drop_extra,
            "calibration": calibration,
            "text_field": text_field,
            "samples": samples,
            "seq_len": seq_len,
            "bos": bos,
            "device": device,
            "seed": seed,
        },
    )
    if dry_run:
        _print_plan(model, merged, json_)
        return
    from cospadi.api.runs import prune as run
    from cospadi.report import ProgressDisplay
    from cospadi.report.depth import print_prune

    quiet_transformers()
    stdout, stderr = consoles()
    with ProgressDisplay(stderr) as display:
        result = run(model, out, recipe=merged, fresh=fresh, progress=display.update, command=command_line())
    if result.complete:
        stderr.print(f"{out} is already complete and was not changed; pass --fresh to prune again", markup=False)
    if json_:
        for line in result.report["warnings"]:
            stderr.print(f"warning: {line}", markup=False, soft_wrap=True)
        print_json(result.report | {"out": str(out)})
        return
    print_prune(result.report, stdout)
    hints = f"\nReport: {out / 'report.html'}"
    if result.report.get("generates", True):
        hints += f'\nTry:    cospadi generate {shlex.quote(str(out))} --prompt "Once upon a time"'
    stdout.print(hints, markup=False, soft_wrap=True)


def _recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe file, if any, with the flags applied on top.

    Raises:
        RecipeError: on an unknown key or an invalid value.
        UsageError: if there is no size.
    """
    from cospadi.options import prune_recipe_from

    merged = prune_recipe_from(path, flags, source="command line")
    assert merged.prune is not None
    if merged.prune.blocks is None and merged.prune.keep_blocks is None:
        raise UsageError("no size given: pass --blocks (such as 2) or --keep-blocks (such as 0.75)")
    return merged


def _print_plan(model: str, merged: Recipe, json_: bool) -> None:
    from cospadi.engine.prune import plan_prune
    from cospadi.report.text import arrow, human_bytes

    quiet_transformers()
    data = plan_prune(model, merged)
    if json_:
        print_json(data)
        return
    sizes = arrow(human_bytes(data["bytes_before"]), human_bytes(data["bytes_after"]))
    consoles()[0].print(
        f"{data['model']} · {data['method']}: {data['blocks_before']} → {data['blocks_after']} blocks, {sizes} at 16 "
        "bits per weight",
        markup=False,
        soft_wrap=True,
    )
    for line in data["warnings"]:
        consoles()[1].print(f"warning: {line}", markup=False, soft_wrap=True)


def register(app: typer.Typer) -> Callable[..., None]:
    """Add the command to the application."""
    return app.command()(prune)
