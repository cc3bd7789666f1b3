"""`cospadi benchmark`: the speed of compressed layers and models on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cospadi.api.directories import check_new_directory
from cospadi.api.lists import token_counts, ways
from cospadi.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    UsageError,
    command_line,
    consoles,
    expand_home,
    local_path,
    print_json,
    quiet_transformers,
    usage_errors,
)


def benchmark(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]",
            help="A model whose shapes are used, or a compressed checkpoint, which is measured as stored.",
            show_default=False,
            callback=expand_home,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: llama-3-8b, llama-3.2-1b, qwen3-8b, smollm2-135m; the first also as a whole model.",
            show_default="all; on a CPU smollm2-135m",
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Comma-separated shares of bytes to keep; 0.4:8 is 0.4 with 8 bits only.")
    ] = "0.6,0.4",
    bits: Annotated[str, typer.Option(help="Comma-separated bits of the factors: 16, 8, 4, 3, 2.")] = "16,8",
    tokens: Annotated[
        str | None,
        typer.Option(help="Comma-separated numbers of tokens.", show_default="1,4,16,2048; on a CPU 1,16,256"),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of decoder layers of the whole model.", show_default="all")
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens in the prefill of the whole model.", show_default="2048; on a CPU 256"),
    ] = None,
    products: Annotated[bool, typer.Option("--products/--no-products", help="Measure single groups of layers.")] = True,
    whole: Annotated[bool, typer.Option("--whole/--no-whole", help="Measure a whole model.")] = True,
    load: Annotated[
        bool, typer.Option("--load", help="Also write checkpoints to OUT, time loading them, and remove them.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, two numbers of tokens, fewer rounds.")] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run whole models, dense and compressed, through torch.compile.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that compile kernels first (GPU).", show_default="one per core, up to 14"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New directory for the numbers and the plot.", show_default=False, parser=local_path, metavar="PATH"
        ),
    ] = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure compressed layers and models, with random weights, against dense ones and rivals of equal size."""
    if model is not None and shapes is not None:
        raise UsageError("both a model and --shapes are given: give one of them")
    if load and out is None:
        raise UsageError("--load writes temporary checkpoints: name a directory for them with --out DIR")
    with usage_errors():
        ways(keep, bits, "--")
        token_counts(tokens, "--tokens")
    if out is not None:
        check_new_directory(out)

    from cospadi.api.measures import benchmark as run
    from cospadi.report import ProgressDisplay
    from cospadi.report.speed import print_speed

    quiet_transformers()
    stdout, stderr = consoles()
    with ProgressDisplay(stderr) as display:
        data = run(
            model,
            shapes=shapes,
            keep=keep,
            bits=bits,
            tokens=tokens,
            layers=layers,
            prompt=prompt,
            products=products,
            whole=whole,
            load=load,
            quick=quick,
            compile=compile_,
            jobs=jobs,
            out=out,
            device=device or "auto",
            seed=seed or 0,
            progress=display.update,
            command=command_line(),
        )
    if json_:
        print_json(data)
        return
    print_speed(data, stdout)
    if out is not None:
        kinds = ",".join(data["files"])
        stdout.print(f"\nFiles: {out / 'benchmark'}.{{{kinds}}}", markup=False, soft_wrap=True)


def register(app: typer.Typer) -> Callable[..., None]:
    """Add the command to the application."""
    return app.command()(benchmark)
