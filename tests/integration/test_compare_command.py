import csv
import json

import pytest
import yaml

from command import command
from tiny import save_tiny, tiny_text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "tiny")
    for name, size, seed in (("calibration", 600, 1), ("test", 500, 2), ("other", 300, 3)):
        (folder / f"{name}.txt").write_text(tiny_text(size, seed=seed), encoding="utf-8")
    return folder


@pytest.fixture
def run(files, tmp_path):
    def go(*arguments, out="out", text=("test.txt",), common=True):
        flags = ("--calibration", files / "calibration.txt", "--samples", 6, "--seq-len", 48, "--eval-seq-len", 64)
        texts = [part for name in text for part in ("--text", files / name)]
        return command(
            "compare", files / "tiny", *arguments, "--out", tmp_path / out, *texts, *(flags if common else ())
        )

    return go


def test_table_files_and_one_object_on_the_last_line(run, tmp_path):
    done = run("--methods", "svd,wanda", "--keep", "0.8,0.6", "--json", text=("test.txt", "other.txt"))
    assert done.code == 0, done.err
    data = done.json
    assert len(data["rows"]) == 4 and len(data["references"]) == 3
    for row in data["rows"]:
        assert {"method", "keep", "perplexity", "bytes", "seconds", "keep_actual"} <= row.keys()
        assert row["bytes"] == pytest.approx(row["keep_actual"] * data["dense"]["bytes"]) and row["keep_actual"] <= 0.8
        assert set(row["texts"]) == {"test.txt", "other.txt"}
        assert row["perplexity"] == row["texts"]["test.txt"]["perplexity"]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        "rows.jsonl",
        *(f"comparison.{kind}" for kind in ("json", "csv", "html", "png", "svg")),
    }
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines[:3]] == ["dense", "svd", "wanda"]
    assert float(lines[1]["perplexity"]) == data["rows"][0]["perplexity"]
    assert float(lines[1]["perplexity other.txt"]) == data["rows"][0]["texts"]["other.txt"]["perplexity"]
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert kept["rows"] == data["rows"] and str(tmp_path) not in json.dumps(kept)


def test_a_table_for_people_names_what_could_not_be_made(run):
    done = run("--methods", "svd,wanda", "--keep", "0.8,0.001")
    assert done.code == 0
    lines = done.out.splitlines()
    assert any("wanda" in line and "80.0%" in line for line in lines)
    assert any(line.startswith("svd at 0.001: keep 0.001 is too small") for line in lines)
    assert any("rtn 4 bit" in line for line in lines) and "measured in float32" in done.out


def test_nothing_could_be_made(run):
    done = run("--methods", "svd", "--keep", "0.001", "--references", "none")
    assert done.code == 1 and "no row could be produced" in done.error and "least possible" in done.error


def test_options_and_recipes_of_single_rows(run, files):
    recipe = files / "few-bits.yaml"
    recipe.write_text(yaml.safe_dump({"method": "rtn", "options": {"bits": 3}}), encoding="utf-8")
    whole = files / "whole.yaml"
    whole.write_text(yaml.safe_dump({"method": "rtn", "keep": 0.6, "options": {"bits": 4}}), encoding="utf-8")
    done = run(
        *("--methods", "rtn,wanda", "--keep", "0.8", "--set", "wanda.pattern=2:4", "--set", "rtn.bits=8"),
        *("--recipe", f"few={recipe}", "--recipe", f"four={whole}", "--references", "none", "--json"),
    )
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in done.json["rows"]}
    assert list(rows) == ["rtn", "wanda", "few", "four"] and done.json["references"] == []
    assert rows["wanda"]["options"] == {"pattern": "2:4"} and rows["four"]["keep"] == 0.6
    sizes = [rows[name]["bytes"] for name in ("rtn", "four", "few")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_saved_rows_are_checkpoints_with_a_page(run, files, tmp_path):
    done = run("--methods", "svd", "--keep", "0.8", "--save", "--references", "none", "--json")
    place = tmp_path / "out" / done.json["rows"][0]["directory"]
    assert {"report.html", "README.md", "config.json"} <= {path.name for path in place.iterdir()}
    again = command("evaluate", place, "--text", files / "test.txt", "--seq-len", 64, "--json")
    assert again.json["perplexity"] == pytest.approx(done.json["rows"][0]["perplexity"], rel=0.02)
    inspected = command("inspect", place, "--json")
    assert inspected.json["bytes_after"] == done.json["rows"][0]["bytes"]


def test_a_second_run_takes_finished_rows_over(run, tmp_path):
    first = run("--methods", "svd", "--keep", "0.8", "--references", "none", "--json").json
    rows = (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8")
    second = run("--methods", "svd", "--keep", "0.8", "--references", "none", "--json")
    assert second.json["rows"] == first["rows"] and "factorise" not in second.err
    assert (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8") == rows


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--keep", "0.8"], 2, "pass --methods"),
        (["--methods", "svd"], 2, "no size given"),
        (["--methods", "svd", "--keep", "0.8;0.6"], 2, "pass shares separated by commas"),
        (["--methods", "svd", "--keep", "0.8", "--set", "rank=3"], 2, "METHOD.KEY=VALUE"),
        (["--methods", "svd", "--keep", "0.8", "--set", "rtn.bits=4"], 2, "METHOD.KEY=VALUE"),
        (["--methods", "svd", "--keep", "0.8", "--recipe", "none.yaml"], 1, "does not exist"),
        (["--methods", "sdv", "--keep", "0.8"], 1, "did you mean 'svd'"),
        (["--methods", "svd", "--keep", "1.8"], 1, "between 0 and 1"),
        (["--methods", "svd", "--keep", "0.8", "--tasks", "none.jsonl"], 1, "no such task file"),
        (["--methods", "svd", "--keep", "0.8", "--limit", "0"], 2, "limit"),
    ],
)
def test_mistakes(run, tmp_path, arguments, code, message):
    done = run(*arguments)
    assert (done.code, message in done.error) == (code, True), done.err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_texts_are_needed(run):
    done = run("--methods", "svd", "--keep", "0.8", text=())
    assert done.code == 2 and "--text" in done.error
    done = run("--methods", "asvd", "--keep", "0.8", common=False)
    assert done.code == 1 and "--calibration" in done.error


def test_evaluate_with_tasks(files, tmp_path):
    words = [word[:4] for word in tiny_text(800, seed=5).split()]
    records = [{"task": "t", "good": " ".join(words[i : i + 3]), "bad": words[i + 9]} for i in range(6)]
    path = tmp_path / "minimal.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    arguments = ("evaluate", files / "tiny", "--tasks", path, "--limit", 4, "--against", files / "tiny")
    data = command(*arguments, "--json").json
    assert data["tasks"]["minimal"]["samples"] == 4 and data["tasks"] == data["dense_tasks"]
    shown = command(*arguments)
    assert shown.code == 0 and "acc, against" in shown.out
    assert command("evaluate", files / "tiny").code == 2
    path.write_text('{"task": "t", "good": "a b"}\n', encoding="utf-8")
    done = command("evaluate", files / "tiny", "--tasks", path)
    assert done.code == 1 and 'line 1 has no "bad"' in done.error
