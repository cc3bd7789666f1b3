"""A pruning method defined outside the package: by its decorator, and as an installed plug-in with an entry point."""

import json
import os
import subprocess
import sys

import pytest

import cospadi
from command import command
from cospadi.errors import RecipeError
from cospadi.pruning import PRUNING, get_pruning_method
from tiny import save_tiny, tiny_text

PLUGIN = '''\
"""A whole pruning method."""

from typing import Annotated

from pydantic import Field

from cospadi.pruning import Cut, Evidence, pruning_method


@pruning_method("every_other", paper="none")
def every_other(evidence: Evidence, blocks: int, *, first: Annotated[int, Field(ge=0)] = 1) -> Cut:
    """Remove every other block, from the bottom up.

    Args:
        evidence: model; the text is not used.
        blocks: number of blocks to remove.
        first: first block to remove.
    """
    return Cut(tuple(range(first, first + 2 * blocks, 2)), told={"measure": "position"})
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny_text(2000), encoding="utf-8")
    return path


def test_a_decorated_function_prunes_and_is_listed(model, text, tmp_path):
    assert len(PLUGIN.splitlines()) < 40
    with PRUNING.temporary():
        exec(PLUGIN, {"__name__": "plugin"})
        recipe = {"calibration": {"samples": 4, "seq_len": 32}}
        result = cospadi.prune(model, tmp_path / "out", method="every_other", blocks=2, calibration=text, recipe=recipe)
        assert result.removed == [1, 3] and result.report["method"] == "every_other"
        listed = {row["name"]: row for row in command("methods", "--json").json["methods"]}
        assert listed["every_other"]["options"] == {"first": 1}
        assert "Remove every other block" in command("methods", "every_other").out
        refused = command("prune", model, tmp_path / "no", "--method", "every_other", "--blocks", 1, "--set", "frst=2")
        assert refused.code == 1 and "did you mean 'first'" in refused.error
    with pytest.raises(RecipeError, match="no pruning method 'every_other'"):
        get_pruning_method("every_other")


def test_an_installed_plug_in_needs_no_import(model, text, tmp_path):
    site = tmp_path / "site"
    (site / "every_other-0.1.dist-info").mkdir(parents=True)
    (site / "every_other_plugin.py").write_text(PLUGIN)
    (site / "every_other-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: every-other\nVersion: 0.1\n")
    (site / "every_other-0.1.dist-info/entry_points.txt").write_text(
        "[cospadi.pruning]\nevery_other = every_other_plugin\n"
    )
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", "from cospadi.cli import main; main()", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert "every_other" in {row["name"] for row in run("methods", "--json")["methods"]}
    flags = ["--calibration", text, "--samples", 4, "--seq-len", 32, "--json"]
    report = run("prune", model, tmp_path / "out", "--method", "every_other", "--blocks", 1, *flags)
    assert report["prune"]["removed"] == [1] and report["blocks_after"] == 4
