"""What people type: paths with ~, shares in percent, sizes in any case, and where the output goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import cospadi
from command import command
from cospadi import Recipe, checkpoint, evaluation
from cospadi.api.lists import ways
from cospadi.cli.app import app
from cospadi.evaluation.compare import compare
from cospadi.evaluation.entries import make_entries
from tiny import save_tiny, tiny_text

PATHS = {"MODEL", "DIR", "OUT", "[DIR]", "[NAME=]PATH"}
NAMES = {"recipe", "calibration", "text", "against", "tasks", "out", "model", "directory"}
COMMANDS = typer.main.get_command(app).commands


def path_options():
    for name, of in COMMANDS.items():
        for option in of.params:
            if option.metavar in PATHS or option.name in NAMES:
                yield pytest.param(of, option, id=f"{name}-{option.name}")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder / "tiny", "llama")
    (folder / "text.txt").write_text(tiny_text(4000), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("of", "option"), list(path_options()))
def test_every_path_option_expands_the_home_directory(of, option, home):
    context = of.make_context(of.name, [], resilient_parsing=True)
    for typed, expected in (("~/a b", home / "a b"), ("b/~", Path("b/~"))):
        found = option.process_value(context, [typed] if option.multiple else typed)
        assert [Path(item) for item in (found if option.multiple else [found])] == [expected]
    named = option.process_value(context, ["./~x"] if option.multiple else "./~x")  # what the message below advises
    assert [Path(item) for item in (named if option.multiple else [named])] == [Path.cwd() / "~x"]


def test_named_recipes_and_lists_of_tasks_expand_the_home_directory(home):
    compare = COMMANDS["compare"]
    context = compare.make_context("compare", [], resilient_parsing=True)
    options = {option.name: option for option in compare.params}
    assert options["recipe"].process_value(context, ["mine=~/r.yaml"]) == [f"mine={home / 'r.yaml'}"]
    assert (
        options["tasks"].process_value(context, "~/a.jsonl, arc_easy,~/b")
        == f"{home / 'a.jsonl'},arc_easy,{home / 'b'}"
    )


def test_a_run_below_the_home_directory_leaves_no_directory_named_tilde(home, tmp_path):
    run = ["compress", "~/tiny", "~/out", "--method", "svd", "--calibration", "~/text.txt", "--samples", 4]
    done = command(*run, "--seq-len", 32, "--keep", "80%")
    assert done.code == 0, done.err
    assert (home / "out/model.safetensors").is_file() and not any(tmp_path.iterdir())
    assert json.loads((home / "out/report.json").read_text(encoding="utf-8"))["keep_requested"] == 0.8


def test_functions_expand_the_home_directory_too(home, tmp_path):
    text = {"calibration": {"source": "~/text.txt", "samples": 4, "seq_len": 32}}
    (home / "recipe.yaml").write_text(json.dumps(text | {"method": "svd", "keep": 0.8}), encoding="utf-8")
    small = cospadi.compress("~/tiny", "~/small", recipe="~/recipe.yaml").out
    short = cospadi.prune("~/tiny", Path("~/short"), method="uidl", blocks=1, recipe=text).out
    assert (small, short) == (home / "small", home / "short")
    assert evaluation.inspect("~/small")["kind"] == "compressed"
    checkpoint.export_dense("~/small", "~/dense")
    model = checkpoint.load("~/small")
    checkpoint.save(model, None, "~/again", checkpoint.read_config("~/small"))
    assert checkpoint.file_bytes("~/again") == checkpoint.file_bytes("~/small")
    cospadi.load("~/dense")
    measured = cospadi.evaluate("~/short", text="~/text.txt", seq_len=32, max_blocks=1, against="~/dense")
    assert measured["bytes"] == checkpoint.file_bytes("~/short")
    run = {"methods": ["svd"], "keeps": [0.8], "text": "~/text.txt", "references": [], "seq_len": 32}
    compare("~/tiny", "~/table", recipe=Recipe(**text), **run)
    assert (home / "table").is_dir()
    assert cospadi.estimate("~/tiny", "~/recipe.yaml").plan.keep_actual < 0.81
    assert not any(tmp_path.iterdir())


def test_the_home_directory_of_a_user_who_does_not_exist_is_refused(tmp_path):
    done = command("compress", "~/tiny", "~no-such-user/out", "--keep", "0.5")
    assert done.code == 2 and "~no-such-user/out" in done.error and "no such home directory" in done.error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("typed", "keep"), [("0.3", 0.3), ("30%", 0.3), ("30 %", 0.3), ("0,3", 0.3), ("62,5%", 0.625)])
def test_spellings_of_a_share(typed, keep):
    assert command("estimate", "~/tiny", "--method", "rtn", "--keep", typed, "--json").json["keep_requested"] == keep


def test_the_share_of_blocks_may_be_in_percent():
    prune = ["prune", "~/tiny", "out", "--method", "uidl", "--dry-run", "--json", "--keep-blocks"]
    found = [command(*prune, typed).json for typed in ("0.7", "70%", "0,7")]
    assert found[0] == found[1] == found[2] and found[0]["blocks_after"] == 2


def test_shares_may_be_in_percent_wherever_they_stand(tmp_path):
    (tmp_path / "r.yaml").write_text("keep: 80%\nanchor_share: 25%\nrefine: {held_out: 12.5%, probe: 10 %}\n")
    recipe = Recipe.load("r.yaml")
    assert (recipe.keep, recipe.anchor_share, recipe.refine.held_out, recipe.refine.probe) == (0.8, 0.25, 0.125, 0.1)
    (tmp_path / "r.yaml").write_text("keep: 0.8\nanchor_share: a quarter\n")
    done = command("estimate", "~/tiny", "--recipe", "r.yaml")
    assert done.code == 1 and "anchor_share" in done.error and "0.8 or 80%" in done.error
    assert ways("60%,0.4,0.6:4", (16, 8)) == ((0.6, 16), (0.6, 8), (0.4, 16), (0.4, 8), (0.6, 4))
    done = command("benchmark", "--keep", "most")
    assert done.code == 2 and "'most'" in done.error and "60%" in done.error
    entries = make_entries(recipe, ["svd"], ["60%", 0.6], {}, {}, [])
    assert [entry.slug for entry in entries] == ["svd-0.6"]


@pytest.mark.parametrize("typed", ["half", "0.3.1", "%", "1/2"])
def test_what_is_no_share_names_the_accepted_spelling(typed):
    for done in (command("estimate", "~/tiny", "--keep", typed), command("demo", "out", "--keep", typed)):
        assert done.code == 2 and typed in done.error and "0.8 or 80%" in done.error


def test_a_comma_separates_shares_where_several_are_accepted(tmp_path):
    run = ["compare", "~/tiny", "--methods", "svd", "--text", "~/text.txt", "--out", "out", "--keep"]
    for typed in ("0,3", "80", "0.8,1.5"):
        done = command(*run, typed)
        assert done.code == 1 and "0.3 or 30%" in done.error and "0.8,0.6" in done.error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("typed", ["60kb", "60KB", "60 Kb", "60000", "60000b"])
def test_units_of_a_size_may_be_written_in_any_case(typed):
    found = [
        command("estimate", "~/tiny", "--method", "rtn", "--target-size", size, "--json").json["keep_requested"]
        for size in (typed, "60kB")
    ]
    assert found[0] == found[1]


def test_a_size_that_is_none_names_the_accepted_spelling():
    done = command("estimate", "~/tiny", "--target-size", "10 megs")
    assert done.code == 1 and "'10 megs'" in done.error and "500MB" in done.error


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, whose streams have the encoding that the environment names."""
    return subprocess.run(
        [sys.executable, "-m", "cospadi", *arguments], capture_output=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_is_not_utf8_ends_with_replacement_characters(home, tmp_path, encoding):
    run = ["compress", str(home / "tiny"), str(tmp_path / "Größe-→-模型"), "--method", "svd", "--keep", "0.8"]
    run += ["--calibration", str(home / "text.txt"), "--samples", "4", "--seq-len", "32"]
    done = process(*run, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert b"Bytes kept" in done.stdout and b"?" in done.stdout and b"Traceback" not in done.stderr
    shown = process(*run, "--json", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert json.loads(shown.stdout.decode(encoding))["out"] == str(tmp_path / "Größe-→-模型")


def test_the_version_has_a_short_option():
    assert command("-V").out == command("--version").out != ""


def test_shells_complete_commands_and_options(tmp_path):
    for typed, expected in (("cospadi comp", {"compress", "compare"}), ("cospadi compress --ke", {"--keep"})):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = process(_COSPADI_COMPLETE="complete_bash", **words)
        assert done.returncode == 0 and set(done.stdout.decode().split()) == expected, done.stderr
    script = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert b"_COSPADI_COMPLETE" in script.stdout
