"""Every block of README.md and docs/ runs here, or carries a marker and the log of its last run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml
from blocks import DATA, MARKERS, PAGES, ROOT, RUN, anchors, blocks, links, spans

from command import command

pytestmark = pytest.mark.docs


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


by_page = pytest.mark.parametrize("page", PAGES, ids=_name)

BRIEF = {
    "compress": ["--samples", "4", "--seq-len", "64"],
    "prune": ["--samples", "4", "--seq-len", "64"],
    "compare": ["--samples", "4", "--seq-len", "64", "--eval-seq-len", "64", "--max-blocks", "1"],
    "evaluate": ["--seq-len", "64", "--max-blocks", "1"],
    "generate": ["--max-new-tokens", "4"],
    "benchmark": ["--tokens", "1", "--prompt", "8"],
}
"""Appended to commands, so that they do little work; options that a command has itself stay."""


def brief(words: list[str]) -> list[str]:
    """A command with the options that make it short."""
    verb = words[0]
    extra = BRIEF.get(verb, [])
    kept = [word for pair in zip(extra[::2], extra[1::2], strict=True) if pair[0] not in words for word in pair]
    if verb == "compress" and set(words) & {"pursuit", "cospadi"}:
        kept += ["--set", "rounds=1"]
    if verb == "compare" and any("pursuit" in word.split(",") for word in words):
        kept += ["--set", "pursuit.rounds=1"]
    return [*words, *kept]


def run_command(line: str, name: str) -> None:
    """One line of a console: cospadi within this process, which saves an import of torch; anything else in a shell."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["cospadi"] and not set(words) & {"|", ">", "&&", ";"}:
        done = command(*brief(words[1:]))
        assert done.code == 0, f"{name}: {line}\n{done.err}"
        return
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{name}: {line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.runs for b in blocks(page))], ids=_name)
def test_a_page_runs_from_top_to_bottom(page: Path, stand_ins: Path) -> None:
    variables: dict[str, object] = {"__name__": "__main__"}
    for block in filter(lambda block: block.runs, blocks(page)):
        if block.language == "python":
            exec(compile(block.text, block.name, "exec"), variables)
        else:
            assert block.commands, f"{block.name}: no line begins with '$ '"
            for line in block.commands:
                run_command(line, block.name)


@by_page
def test_every_block_is_run_or_marked(page: Path) -> None:
    for block in blocks(page):
        assert block.language in RUN | DATA, f"{block.name}: name the language, one of {sorted(RUN | DATA)}"
        hidden = block.language in DATA and re.search(r"^\$ ", block.text, re.MULTILINE)
        assert not hidden, f"{block.name}: commands in a block that is not run"
        if block.marker is None:
            continue
        assert block.language in RUN, f"{block.name}: only what would be run carries a marker"
        assert block.marker in MARKERS, f"{block.name}: {block.marker!r} is none of {sorted(MARKERS)}"
        log = (ROOT / str(block.log)).read_text(encoding="utf-8")
        for line in block.commands or block.text.splitlines():
            said = re.sub(r"\s+#.*$", "", line)
            if said.strip():
                assert f"$ {said}" in log, f"{block.name}: {block.log} does not hold the command {said!r}"


@by_page
def test_data_is_valid(page: Path) -> None:
    from cospadi import Recipe
    from cospadi.methods import get_method

    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            recipe = Recipe.of(yaml.safe_load(block.text))
            get_method(recipe.method).check(recipe.options)


def _click() -> click.Group:
    from cospadi.cli.app import app

    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    return group  # type: ignore[return-value]


def _check_options(line: str, where: str) -> None:
    words = line.split()
    verb = _click().commands.get(words[1]) if len(words) > 1 else None
    if len(words) > 1 and not words[1].startswith("-"):
        assert verb is not None, f"{where}: there is no command {words[1]!r}"
    known = {option for p in (verb.params if verb else []) for option in (*p.opts, *p.secondary_opts)}
    for word in words[2:]:
        option = word.strip("[]").split("=")[0]
        if option.startswith("--") and verb is not None:
            assert option in known | {"--debug", "--help"}, f"{where}: {words[1]} has no option {option}"


@by_page
def test_commands_exist_also_in_text_and_marked_blocks(page: Path) -> None:
    for span in spans(page):
        if re.match(r"cospadi \w", span):
            _check_options(span, f"{page.name}: `{span}`")
    for block in filter(lambda block: block.language in RUN, blocks(page)):
        for line in block.commands if block.language != "python" else []:
            words = shlex.split(line, comments=True)
            if words[:1] == ["cospadi"]:
                _check_options(" ".join(words), block.name)


@by_page
def test_links_and_named_files_are_there(page: Path) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}: no such heading"
    for span in spans(page):
        if re.fullmatch(r"(benchmarks|recipes|examples|scripts|tests)/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{page.name}: `{span}` is not there"


def test_every_log_is_used() -> None:
    used = {block.log for page in PAGES for block in blocks(page) if block.log}
    assert used == {f"docs/logs/{path.name}" for path in (ROOT / "docs" / "logs").iterdir()}


def test_the_table_of_recipe_keys_is_complete() -> None:
    from cospadi.recipe import Calibration, Prune, Recipe, Refine

    sections = {"calibration": Calibration, "prune": Prune, "refine": Refine}
    expected = {key for key in Recipe.model_fields if key not in sections}
    expected |= {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("### Recipe keys")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)) == expected


def test_every_public_name_and_error_is_in_the_reference() -> None:
    import cospadi
    from cospadi import errors

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE))
    raised = {name for name, value in vars(errors).items() if name.endswith("Error") and isinstance(value, type)}
    assert raised <= set(cospadi.__all__)
    assert named >= {f"cospadi.{name}" for name in cospadi.__all__}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


PAGE = """
<!-- run: gpu log=docs/logs/a.txt -->
```console
$ cospadi demo \\
    out
printed
$ cospadi doctor  # checks
```

text

```python
print("hello")
```
"""


def test_blocks_are_found_with_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    marked, plain = blocks(page)
    assert marked.commands == ["cospadi demo \\\n    out", "cospadi doctor  # checks"]
    assert (marked.marker, marked.log, marked.runs) == ("gpu", "docs/logs/a.txt", False)
    assert (plain.marker, plain.language, plain.runs) == (None, "python", True)


def test_a_block_that_is_neither_run_nor_marked_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for language in ("", "sh", "output"):
        page.write_text(f"```{language}\necho\n```\n", encoding="utf-8")
        assert blocks(page)[0].language not in RUN | DATA
