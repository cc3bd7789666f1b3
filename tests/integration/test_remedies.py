"""Every remedy that a message names is accepted: flags, values, settings, commands, extras; common ones are tried."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
import typer

import cospadi
from command import command, unchanged
from cospadi.cli.app import app
from cospadi.methods import all_methods
from cospadi.pruning import all_pruning_methods
from cospadi.recipe import Recipe
from cospadi.runtime.devices import resolve_device
from tiny import save_tiny, tiny_text

PACKAGE = Path(cospadi.__file__).parent
STYLES = {"style.py", "html_parts.py"}  # --ink and the like are colours of CSS
COMMANDS = typer.main.get_command(app).commands
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SETTING = re.compile(r"--set (?:[a-z_]+\.)?([a-z_]+)=")
VERB = re.compile(r"(?:`|Try: +)cospadi ([a-z]+)")
EXTRA = re.compile(r"cospadi\[(\w+)\]")


def messages():
    """Every string of the package that is not a docstring, with the place where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name in STYLES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {
            id(statement.value)
            for node in ast.walk(tree)
            for statement in (node.body if isinstance(getattr(node, "body", None), list) else [])
            if isinstance(statement, ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value


def named(pattern: re.Pattern) -> dict[str, str]:
    """What messages name, and one place where."""
    return {found: place for place, text in messages() for found in pattern.findall(text)}


def accepted_flags() -> set[str]:
    own = {"--debug", "--help", "--version", "--show-completion", "--install-completion"}
    return own.union(*({*p.opts, *p.secondary_opts} for verb in COMMANDS.values() for p in verb.params))


@pytest.mark.parametrize("flag", sorted(named(FLAG)))
def test_some_command_takes_every_flag_that_is_named(flag):
    assert flag in accepted_flags(), named(FLAG)[flag]


@pytest.mark.parametrize("key", sorted(named(SETTING)))
def test_some_method_takes_every_setting_that_is_named(key):
    known = {
        option
        for of in (all_methods(), all_pruning_methods())
        for m in of.values()
        for option in m.options.model_fields
    }
    assert key in known | {"num_bits", "group_size"}, named(SETTING)[key]


@pytest.mark.parametrize(
    ("pattern", "accept"),
    [
        (r"--allocation ([a-z]+)", lambda value: Recipe(allocation=value)),
        (r"--grouping ([a-z_]+)", lambda value: Recipe(grouping=value)),
        (r"--device ([a-z]+)", resolve_device),
        (r"--samples (\d+)", lambda value: Recipe(calibration={"samples": int(value)})),
        (r"--seq-len (\d+)", lambda value: Recipe(calibration={"seq_len": int(value)})),
        (r"--methods ([a-z]+(?:,[a-z]+)+)", lambda value: [all_methods()[name] for name in value.split(",")]),
    ],
)
def test_every_value_that_is_named_is_valid(pattern, accept):
    prose = {"or", "and", "such", "is", "are"}
    values = set(named(re.compile(pattern))) - prose
    assert values, f"no message matches {pattern}"
    for value in values:
        assert accept(value) is not None


def test_every_command_and_extra_that_is_named_exists():
    assert set(named(VERB)) <= set(COMMANDS) and "methods" in named(VERB)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(named(EXTRA)) <= set(project["optional-dependencies"]) and "report" in named(EXTRA)


# --- tried end to end --------------------------------------------------------------------------------------------

TEXT = ("--calibration", "text.txt", "--samples", 4, "--seq-len", 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "tiny", "llama")
    save_tiny(folder / "four", "llama", num_hidden_layers=4)
    save_tiny(folder / "gemma", "gemma3_text")
    save_tiny(folder / "opt", "opt", max_position_embeddings=64)
    (folder / "text.txt").write_text(tiny_text(4000), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def tried(arguments, remedies, *instead, without=()):
    """What becomes of a command that fails and names some remedies, once one of them is carried out.

    Args:
        arguments: of the command that fails.
        remedies: parts of its message.
        instead: arguments that carry the remedy out, after those of the command.
        without: arguments that it replaces.
    """
    failed = command(*arguments)
    assert failed.code in (1, 2), failed.out
    for remedy in remedies:
        assert remedy in failed.error, failed.error
    done = command(*(argument for argument in arguments if argument not in without), *instead)
    print(done.err)  # shown where the command failed again
    return done


def test_a_size(models):
    for size in (("--keep", 0.8), ("--target-size", "65kB")):
        assert tried(["estimate", "tiny", "--method", "rtn"], ["no size given", size[0]], *size).code == 0
    for size in (("--blocks", 1), ("--keep-blocks", 0.75)):
        assert tried(["prune", "tiny", "out", "--method", "uidl", "--dry-run"], [size[0]], *size).code == 0


def test_sequences_that_the_text_does_not_fill():
    run = ["compress", "tiny", "out", "--method", "svd", "--keep", 0.8, "--calibration", "text.txt", "--samples", 2]
    assert tried([*run, "--seq-len", 8000], ["smaller --seq-len"], "--seq-len", 32).code == 0


def test_sequences_that_are_longer_than_the_learned_positions():
    run = ["compress", "opt", "out", "--method", "svd", "--keep", 0.8, "--calibration", "text.txt", "--samples", 2]
    assert tried([*run, "--seq-len", 65], ["--seq-len 64 or less"], "--seq-len", 64).code == 0


def test_a_device_that_is_not_there():
    run = ["compress", "tiny", "out", "--method", "svd", "--keep", 0.8, *TEXT, "--device", "cuda:99"]
    assert tried(run, ["--device cpu"], "--device", "cpu").code == 0


def test_another_run_in_the_output_directory():
    run = ["compress", "tiny", "out", "--method", "svd", *TEXT, "--keep"]
    assert command(*run, 0.8).code == 0
    with unchanged(Path("out")):
        assert command(*run, 0.7).code == 1
    assert tried([*run, 0.7], ["--fresh"], "--fresh").code == 0
    prune = ["prune", "tiny", "pruned", "--method", "uidl", *TEXT, "--blocks"]
    assert command(*prune, 1).code == 0
    assert tried([*prune, 2], ["--fresh"], "--fresh").code == 0


def test_no_text():
    assert tried(["compress", "tiny", "out", "--method", "asvd", "--keep", 0.8], ["--calibration"], *TEXT).code == 0
    measure = ["evaluate", "tiny", "--seq-len", 32]
    assert tried(measure, ["--text FILE"], "--text", "text.txt").code == 0


def test_the_field_that_holds_the_text(tmp_path):
    (tmp_path / "body.jsonl").write_text(json.dumps({"id": 1, "body": tiny_text(400)}), encoding="utf-8")
    measure = ["evaluate", "tiny", "--seq-len", 32, "--text", tmp_path / "body.jsonl"]
    assert tried(measure, ["'id', 'body'", "--text-field NAME"], "--text-field", "body").code == 0


def test_modules_that_do_not_exist():
    run = ["estimate", "tiny", "--method", "rtn", "--keep", 0.8, "--only"]
    failed = command(*run, "q_prj").error
    for name in re.search(r"they end in ([\w, ]+)", failed)[1].split(", "):
        assert command(*run, name).code == 0


def test_the_form_of_an_export():
    assert command("compress", "tiny", "small", "--method", "svd", "--keep", 0.8, *TEXT).code == 0
    assert tried(["export", "small", "dense"], ["--dense"], "--dense").code == 0


def test_blocks_of_a_width_method():
    run = ["prune", "tiny", "out", "--method", "slicegpt", *TEXT, "--blocks", 1]
    assert tried(run, ["--keep-blocks"], "--keep-blocks", 0.8, without=("--blocks", 1)).code == 0


def test_blocks_that_always_stay():
    run = ["prune", "tiny", "out", "--method", "sleb", *TEXT, "--blocks", 1, "--set", "first=2"]
    assert tried(run, ["--set first=", "--set last="], "--set", "first=0", "--set", "last=0").code == 0


def test_a_transform_without_a_place():
    run = ["prune", "gemma", "out", "--method", "replaceme", *TEXT, "--blocks", 1]
    assert tried(run, ["--set separate=true"], "--set", "separate=true").code == 0


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def flags_of(error: str, verb: str) -> set[str]:
    """The flags that a message names, all of which the command accepts."""
    found = set(FLAG.findall(error))
    assert found <= {option for parameter in COMMANDS[verb].params for option in parameter.opts}, error
    return found


@pytest.mark.parametrize(
    ("where", "flag", "value"),
    [
        ("cospadi.model_view.LayerReplay.logits", "--allocation", "uniform"),
        ("cospadi.calibration.statistics.Accumulator.add", "--samples", 2),
        ("cospadi.calibration.statistics.Accumulator.add", "--seq-len", 16),
    ],
)
def test_memory_that_does_not_suffice_for_compression(monkeypatch, where, flag, value):
    run = ["compress", "tiny", "out", "--method", "auto", "--keep", 0.5, *TEXT]
    with monkeypatch.context() as patch:
        patch.setattr(where, out_of_memory)
        failed = command(*run)
    assert failed.code == 1 and {flag, "--device"} <= flags_of(failed.error, "compress")
    done = command(*run, flag, value, "--device", "cpu", "--fresh")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("verb", "where", "flag", "value"),
    [
        ("evaluate", "transformers.LlamaModel.forward", "--batch", 1),
        ("generate", "transformers.GenerationMixin.generate", "--max-new-tokens", 2),
    ],
)
def test_memory_that_does_not_suffice_for_a_measurement(monkeypatch, verb, where, flag, value):
    run = [verb, "tiny", *({"evaluate": ["--text", "text.txt", "--seq-len", 32], "generate": ["--prompt", "a"]}[verb])]
    with monkeypatch.context() as patch:
        patch.setattr(where, out_of_memory)
        failed = command(*run)
    assert failed.code == 1 and {flag, "--device"} <= flags_of(failed.error, verb)
    assert command(*run, flag, value, "--device", "cpu").code == 0
