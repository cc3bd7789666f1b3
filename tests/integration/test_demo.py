"""The demonstration, with fewer tokens and a quicker method than people see."""

import json
import re
from functools import partial

import pytest

from command import command, snapshot, unchanged
from cospadi.checkpoint import factor_bytes
from cospadi.evaluation import demo
from cospadi.evaluation.demo import run_demo


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("SAMPLES", 4), ("LENGTH", 128), ("BLOCKS", 2)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "run_demo", partial(run_demo, methods=("svd_llm", "svd")))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the demonstration used the network"))


def test_end_to_end_and_again(tmp_path):
    out = tmp_path / "de mo"
    done = command("demo", out, "--keep", "0.6", width=80)
    assert done.code == 0, done.err
    kept = json.loads((out / "demo.json").read_text())
    rows = {row["method"]: row for row in kept["rows"]}
    assert rows.keys() == {"svd_llm", "svd"}
    assert kept["dense"]["perplexity"] < rows["svd_llm"]["perplexity"] < rows["svd"]["perplexity"]
    for name, row in rows.items():
        assert 0.59 < row["keep_actual"] <= 0.6
        stored = json.loads((out / row["directory"] / "report.json").read_text())
        assert stored["bytes_after"] == factor_bytes(out / row["directory"])
        assert stored["evaluation"]["perplexity"] == row["perplexity"]
        assert stored["evaluation"]["dense_perplexity"] == kept["dense"]["perplexity"]
        assert f"{row['perplexity']:.2f}" in done.out or f"{row['perplexity']:,.0f}" in done.out
        assert str(out / f"{name}-0.6/report.html") in done.out
    assert abs(rows["svd"]["bytes"] - rows["svd_llm"]["bytes"]) < 0.01 * rows["svd"]["bytes"]
    table = [line for line in done.out.splitlines() if "%" in line]
    assert len(table) == 3 and max(map(len, table)) <= 80
    assert re.search(r"factorise: .*svd_llm 0\.6: model\.layers", done.err) and "Loading weights" not in done.err
    with unchanged(out):
        again = command("demo", out, "--keep", "0.6", "--json")
    assert again.code == 0 and "nothing was computed" in again.err
    assert "calibrate" not in again.err and "svd 0.6" not in again.err
    assert again.json["rows"] == kept["rows"] and again.json["dense"] == kept["dense"]


def test_what_is_missing_is_made_again(tmp_path):
    assert command("demo", tmp_path, "--keep", "0.6").code == 0
    before = snapshot(tmp_path)
    (tmp_path / "svd-0.6/report.html").unlink()
    (tmp_path / "svd_llm-0.6/report.json").unlink()
    assert command("demo", tmp_path, "--keep", "0.6").code == 0
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    assert after["svd_llm-0.6/model.safetensors"] == before["svd_llm-0.6/model.safetensors"]


def test_mistakes_come_to_light_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full/svd_llm-0.6").mkdir(parents=True)
    (tmp_path / "full/svd_llm-0.6/theirs.txt").write_text("x")
    with unchanged(tmp_path):
        for arguments, word in (
            (["out", "--keep", "1.5"], "between 0 and 1"),
            (["file", "--keep", "0.6"], "is a file"),
            (["full", "--keep", "0.6"], "not empty"),
        ):
            done = command("demo", tmp_path / arguments[0], *arguments[1:])
            assert done.code == 1 and word in done.error and "evaluate" not in done.err
