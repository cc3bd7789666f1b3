"""`cospadi benchmark`: the speed of compressed layers and models on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cospadi.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    UsageError,
    check_new_directory,
    command_line,
    consoles,
    expand_home,
    local_path,
    print_json,
    quiet_transformers,
)
from cospadi.cli.compare import split
from cospadi.errors import RecipeError
from cospadi.quantities import parse_share

Number = TypeVar("Number", int, float)


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
    widths = _widths(bits, "--bits")
    ways = _ways(keep, widths)
    counts = _numbers(tokens or "", "--tokens", int, lambda count: count > 0, "whole numbers above 0, such as 1,2048")
    if not ways:
        raise UsageError("nothing to measure: --keep and --bits each need at least one number")
    if out is not None:
        check_new_directory(out)

    from cospadi.evaluation.speed import Settings
    from cospadi.evaluation.speed import benchmark as run
    from cospadi.report import ProgressDisplay
    from cospadi.report.speed import print_speed, write_numbers, write_speed

    quiet_transformers()
    stdout, stderr = consoles()
    settings = Settings(
        model=model,
        shapes=tuple(split(shapes)),
        ways=ways,
        tokens=counts,
        layers=layers,
        prompt=prompt,
        products=products,
        whole=whole,
        load=load,
        quick=quick,
        jobs=jobs or 0,
        compile=compile_,
        device=device or "auto",
        seed=seed or 0,
    )

    def keep_partial(found: dict[str, Any]) -> None:
        if out is not None:
            write_numbers(found, out)

    with ProgressDisplay(stderr) as display:
        data = run(settings, out=out, command=command_line(), progress=display.update, partial=keep_partial)
    files = [] if out is None else write_speed(data, out)
    if json_:
        print_json(data)
        return
    print_speed(data, stdout)
    if files:
        kinds = ",".join(path.suffix.removeprefix(".") for path in files)
        stdout.print(f"\nFiles: {files[0].with_suffix('')}.{{{kinds}}}", markup=False, soft_wrap=True)


def _widths(text: str, option: str) -> tuple[int, ...]:
    return _numbers(text, option, int, lambda width: width in (16, 8, 4, 3, 2), "some of 16,8,4,3,2")


def _ways(text: str, widths: tuple[int, ...]) -> tuple[tuple[float, int], ...]:
    """Pairs of keep and bits; a keep without its own bits is combined with all of `widths`.

    Raises:
        UsageError: if a word is not a share, or not a number of bits.
    """
    found: list[tuple[float, int]] = []
    for word in split(text):
        share, _, width = word.partition(":")
        wanted = "shares above 0 and up to 1, such as 0.6,0.4 or 60%:16,40%:8"
        keeps = _numbers(share, "--keep", parse_share, lambda keep: 0 < keep <= 1, wanted)
        found += [(keep, own) for keep in keeps for own in (_widths(width, "--keep") if width else widths)]
    return tuple(dict.fromkeys(found))


def _numbers(
    text: str, option: str, kind: Callable[[str], Number], fits: Callable[[Number], bool], wanted: str
) -> tuple[Number, ...]:
    """The distinct numbers of a comma-separated list, in the order given.

    Raises:
        UsageError: if a word is not a number, or does not fit.
    """
    found: list[Number] = []
    for word in split(text):
        try:
            value = kind(word)
        except (ValueError, RecipeError):
            raise UsageError(f"{option} {word!r}: give {wanted}") from None
        if not fits(value):
            raise UsageError(f"{option} {word!r}: give {wanted}")
        found.append(value)
    return tuple(dict.fromkeys(found))


def register(app: typer.Typer) -> Callable[..., None]:
    """Add the command to the application."""
    return app.command()(benchmark)
