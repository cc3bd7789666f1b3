"""What the commands share: options, output, and the recipe made from flags. Does not import torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
import yaml

from cospadi.errors import CospadiError, OutputError, RecipeError
from cospadi.io import expanded

if TYPE_CHECKING:
    from rich.console import Console

    from cospadi.recipe import Recipe


class UsageError(CospadiError):
    """The command line is wrong: an argument is missing, unknown, or contradicts another; exit code 2."""


def expand_home(value: Any) -> Any:
    """A path option with ``~`` replaced by the home directory; every option that is kept as text has this callback.

    Args:
        value: a path as text, several in a list, or None. ``NAME=PATH`` is expanded after the equals sign.

    Raises:
        UsageError: if it begins with the name of a user who does not exist.
    """
    if isinstance(value, (list, tuple)):
        return [expand_home(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.partition("=")
    if equals and path.startswith("~"):
        return f"{name}={expand_home(path)}"
    return str(local_path(value)) if value.startswith(("~", "./~")) else value


def local_path(text: str) -> Path:
    """The path of an option that is a :class:`~pathlib.Path`, ``~`` expanded.

    Raises:
        UsageError: if it begins with the name of a user who does not exist.
    """
    try:
        return expanded(text)
    except OutputError as error:
        raise UsageError(str(error)) from None


def split_paths(text: str | None) -> str | None:
    """A comma-separated list of paths or names, each with ``~`` expanded."""
    return None if text is None else ",".join(expand_home(part.strip()) for part in text.split(","))


def share(text: str) -> float:
    """The share of an option such as ``--keep 0.8`` or ``--keep 80%``."""
    from cospadi.quantities import parse_share

    try:
        return parse_share(text)
    except CospadiError as error:
        raise typer.BadParameter(str(error)) from None


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model: a local directory or a hub id.", callback=expand_home)
]
DirArgument = Annotated[
    str,
    typer.Argument(metavar="DIR", help="A checkpoint: compressed, pruned or dense.", callback=expand_home),
]
OutArgument = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="Output directory: new, empty, or from an interrupted run of the same command.",
        parser=local_path,
    ),
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        parser=share,
        metavar="SHARE",
        help="Share of the linear layers' bytes to keep, such as 0.6 or 60%.",
        show_default=False,
    ),
]
KeepBlocksOption = Annotated[
    float | None,
    typer.Option(
        parser=share,
        metavar="SHARE",
        help="Share of the blocks' bytes to keep, such as 0.75 or 75%; instead of --blocks.",
        show_default=False,
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(help="Total size of all files, such as 5GB; instead of --keep.", show_default=False)
]
MethodOption = Annotated[
    str | None, typer.Option(help="Compression method; `cospadi methods` lists them.", show_default="auto")
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with settings; flags override it.", show_default=False, parser=local_path, metavar="PATH"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set an option of the method; repeatable.", show_default=False),
]
GroupingOption = Annotated[
    str | None,
    typer.Option(
        help="Which layers share a dictionary: matrix, siblings, cross_layer or pairs.", show_default="the method's"
    ),
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help="How bytes are divided among layers: uniform, pooled, truncation, rocket or knapsack.",
        show_default="the method's",
    ),
]
SequentialOption = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Take each layer's statistics after the layers before it are compressed.",
        show_default="the method's",
    ),
]
GramOption = Annotated[
    str | None,
    typer.Option(
        help="Tokens count alike in a layer's statistics (plain), or by how much the loss minds errors there (loss).",
        show_default="the method's",
    ),
]
AnchorOption = Annotated[
    bool | None,
    typer.Option(
        "--anchor/--no-anchor",
        help="Fit each layer to the original outputs, given inputs from the already compressed layers.",
        show_default="no",
    ),
]
RefineOption = Annotated[
    bool | None,
    typer.Option("--refine/--no-refine", help="Tune each decoder layer after it is factorised.", show_default="no"),
]
DropExtraOption = Annotated[
    bool | None,
    typer.Option(
        "--drop-extra",
        help="Leave out stored tensors that the model's class does not take, such as mtp.*, instead of copying them.",
        show_default=False,
    ),
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        help="Compress only these modules: names or patterns separated by commas, such as q_proj,k_proj or self_attn.",
        show_default="all; masa: attention",
    ),
]
TEXT_HELP = (
    "a file or directory (.txt, .md, .jsonl, .json, .csv, .parquet, each also .gz or .zst), - for standard input, or a "
    "hub dataset."
)
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help=f"Calibration text: {TEXT_HELP}",
        show_default=False,
        callback=expand_home,
    ),
]
TextFieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Field of the records that holds the text or messages.",
        show_default="text, messages, or prompt and completion",
    ),
]
SamplesOption = Annotated[int | None, typer.Option(help="Number of calibration sequences.", show_default="256")]
LengthOption = Annotated[int | None, typer.Option(help="Tokens per calibration sequence.", show_default="1024")]
BosOption = Annotated[
    Literal["auto", "on", "off"] | None,
    typer.Option(help="Begin sequences with the BOS token; auto: where the tokenizer adds it.", show_default="auto"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.", show_default="auto")
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of every random choice.", show_default="0")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


def consoles() -> tuple[Console, Console]:
    """Consoles for results (stdout) and for messages and progress (stderr)."""
    from rich.console import Console

    return Console(highlight=False), Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """Print one JSON object on one line of stdout, in ASCII unless its encoding is a Unicode one."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    print(json.dumps(data, ensure_ascii=not encoding.startswith("utf"), sort_keys=True), flush=True)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Settings such as ``["rho=3", "pattern=free"]`` as a dict; values are read as YAML.

    Raises:
        UsageError: if a setting has no ``=``, or its value cannot be read.
    """
    out: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting!r}: write KEY=VALUE, for example --set rho=3")
        try:
            # YAML would read the pattern 16:32 as a base-60 number
            out[key.strip()] = value if ":" in value else yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting!r}: {value!r} is neither a number nor a word") from None
    return out


def make_recipe(recipe: Path | None, *, settings: list[str] | None = None, **flags: Any) -> Recipe:
    """The recipe of a file, overridden by the flags that are given (not None).

    Raises:
        RecipeError: on an unknown key or a wrong value.
        UsageError: if no size is given, or two flags give one.
    """
    from cospadi.options import recipe_from

    if flags.get("keep") is not None and flags.get("target_size") is not None:
        raise UsageError("--keep and --target-size are both given: pass only one")
    merged = recipe_from(recipe, flags | {"options": parse_settings(settings) or None}, source="command line")
    if merged.keep is None and merged.target_size is None:
        raise UsageError("no size given: pass --keep or --target-size")
    return merged


def quiet_transformers() -> None:
    """Silence the progress bars and remarks of transformers; downloads from the hub keep their bars."""
    from huggingface_hub import utils
    from transformers.utils import logging

    hub, chatter = cast(Any, utils), cast(Any, logging)  # neither has types
    disabled = hub.are_progress_bars_disabled()
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    if not disabled:
        hub.enable_progress_bars()


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report a value that an option cannot have as wrong usage.

    Raises:
        UsageError: in place of a :class:`~cospadi.errors.RecipeError`.
    """
    try:
        yield
    except RecipeError as error:
        raise UsageError(str(error)) from None


def command_line() -> str:
    """The command line as typed, with the program's name instead of its path."""
    import shlex

    return shlex.join(["cospadi", *sys.argv[1:]])
