"""`cospadi demo`: the whole path on the embedded model."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cospadi.cli.common import (
    JsonOption,
    consoles,
    local_path,
    print_json,
    quiet_transformers,
    share,
)


def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory.", parser=local_path)] = Path(
        "demo-report"
    ),
    keep: Annotated[
        list[float] | None,
        typer.Option(
            parser=share, metavar="SHARE", help="Shares of bytes to keep; repeatable.", show_default="0.4 and 0.2"
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """A two-minute end-to-end run on the embedded model: compress, evaluate, compare; needs no network."""
    from cospadi.evaluation.demo import KEEPS, run_demo
    from cospadi.report import ProgressDisplay, pages_written, print_comparison, write_all
    from cospadi.report.text import human_count

    quiet_transformers()
    stdout, stderr = consoles()
    with ProgressDisplay(stderr) as display:
        data = run_demo(out, keeps=keep or KEEPS, progress=display.update)
    changed = data.pop("changed")
    for report in data.pop("reports"):
        folder = out / report["directory"]
        if report["directory"] in changed or not pages_written(folder):
            write_all(report, folder)
    if not changed:
        stderr.print("all results were already complete; nothing was computed")
    if json_:
        print_json(data | {"out": str(out)})
        return
    stdout.print(
        f"A small language model of Python code, included in cospadi ({human_count(data['parameters'])} parameters), "
        f"compressed without retraining and calibrated on {data['calibration_tokens']:,} tokens. Perplexity (lower is "
        "better) is measured on code the model was not trained on. Each size is reached with the default method and, "
        "for the same number of bytes, with two textbook methods: rounding to nearest and truncated SVD."
    )
    print_comparison(data["rows"], stdout, data["dense"])
    stdout.print(
        "keep: requested share of the linear layers' bytes; kept: the share that was reached. bytes: all weights, "
        "including those that are not compressed. time: of compression, on this machine.\n"
    )
    for row in data["rows"]:
        stdout.print(Text(f"Report: {out / row['directory'] / 'report.html'}"), soft_wrap=True)
    best = shlex.quote(str(out / data["rows"][0]["directory"]))
    stdout.print(Text(f'Try:    cospadi generate {best} --prompt "def read("'), soft_wrap=True)


def register(app: typer.Typer) -> Callable[..., None]:
    """Add the command to the application."""
    return app.command()(demo)
