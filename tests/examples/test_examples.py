import runpy
import sys
from pathlib import Path

import pytest

from cospadi.methods import METHODS

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "compress_from_python": "kept 7",
    "load_and_generate": "def main():",
    "compare_methods": "svd_llm",
    "own_method": "power 1: output error",
    "export_dense": "exported",
    "lora": "merged into dense: logits differ by",
}


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, str(tmp_path / "out")])
    monkeypatch.chdir(tmp_path)
    with METHODS.temporary():
        runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert all(made.name.startswith("out") for made in tmp_path.iterdir())
