"""Methods that need no calibration text ask for none, in every command that plans or runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import cospadi
from command import command, weights
from tiny import save_tiny, tiny_text

RTN = ("--keep", "0.4", "--method", "rtn", "--device", "cpu", "--json")
TEXT = ("--calibration", "text.txt", "--samples", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_text")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(tiny_text(400), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.mark.parametrize("grouping", ["matrix", "siblings", "cross_layer"])
def test_the_weights_are_those_of_a_run_with_text(tmp_path, grouping):
    flags = (*RTN, "--grouping", grouping)
    without = command("compress", "model", tmp_path / "a", *flags).json
    calibrated = command("compress", "model", tmp_path / "b", *flags, *TEXT).json
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert without["calibration"] is None and calibrated["calibration"]["source"] == "text.txt"
    assert all(0 < group["error"] < 0.1 for group in without["groups"])
    assert command("evaluate", tmp_path / "a", "--text", "text.txt", "--seq-len", 32, "--json").json["perplexity"] > 1


def test_the_error_is_that_of_the_weights_and_the_pages_say_so(tmp_path):
    report = command("compress", "model", tmp_path / "c", *RTN).json
    dense = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    small, _ = cospadi.load(tmp_path / "c", dtype=torch.float32, compose=True)
    for group in report["groups"]:
        before, after = (model.get_parameter(f"{group['modules'][0]}.weight").double() for model in (dense, small))
        wanted = float((before - after).square().sum() / before.square().sum())
        assert group["error"] == pytest.approx(wanted, rel=1e-3)
    for page in ("report.html", "README.md"):
        content = (tmp_path / "c" / page).read_text(encoding="utf-8")
        assert "relative error of the weights (no calibration text was used)" in content
        assert "Calibration text" not in content


def test_a_second_run_is_complete_and_one_with_text_is_another(tmp_path):
    command("compress", "model", tmp_path / "c", *RTN)
    assert "already complete" in command("compress", "model", tmp_path / "c", *RTN).err
    assert command("compress", "model", tmp_path / "c", *RTN, *TEXT).code == 1


def test_svd_needs_none_either(tmp_path):
    result = cospadi.compress("model", tmp_path / "s", keep=0.6, method="svd", device="cpu")
    assert result.report["calibration"] is None
    errors = [group["error"] for group in result.report["groups"]]
    assert all(0 < error < 1 for error in errors)


def test_the_estimate_and_the_dry_run_count_no_calibration():
    for arguments in (("estimate", "model"), ("compress", "model", "out", "--dry-run")):
        found = command(*arguments, *RTN).json
        assert "calibrate" not in found["seconds"] and found["memory"]["hidden_states"] == 0
        gptq = command(*arguments, *(part.replace("rtn", "gptq") for part in RTN)).json
        assert gptq["seconds"]["calibrate"] > 0 and gptq["memory"]["hidden_states"] > 0
    with_text = command("compress", "model", "out", "--dry-run", *RTN, *TEXT).json
    assert with_text["seconds"]["calibrate"] > 0 and with_text["flops"] > found["flops"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "gptq"),
        ("--sequential",),
        ("--anchor",),
        ("--refine",),
        ("--gram", "loss"),
        ("--allocation", "knapsack"),
        ("--method", "auto"),
    ],
)
def test_what_follows_the_text_still_asks_for_it(tmp_path, flags):
    done = command("compress", "model", tmp_path / "out", *RTN, *flags)
    assert done.code == 1 and done.error.startswith("no calibration text: name a file (.txt, .md, .jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_pruning_by_weights_or_chance(tmp_path, method):
    flags = ("--blocks", "1", "--method", method, "--device", "cpu", "--json")
    without = command("prune", "model", tmp_path / "a", *flags).json
    calibrated = command("prune", "model", tmp_path / "b", *flags, *TEXT).json
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert without["calibration"] is None and without["distances"] is None
    assert calibrated["distances"]["cosine"] and calibrated["calibration"]["samples_used"] == 4
    recipe = {"method": "rtn", "keep": 0.3, "device": "cpu", "prune": {"method": method, "blocks": 1}}
    both = cospadi.compress("model", tmp_path / "c", recipe=recipe).report
    assert both["calibration"] is None and both["prune"]["removed"] == without["prune"]["removed"]
    done = command("prune", "model", tmp_path / "d", "--blocks", "1", "--method", "shortgpt")
    assert done.code == 1 and done.error.startswith("no calibration text")


def test_a_comparison_asks_for_text_only_where_a_row_needs_it(tmp_path):
    flags = ("--keep", "0.4", "--references", "none", "--text", "text.txt", "--eval-seq-len", 32, "--device", "cpu")
    done = command("compare", "model", "--methods", "rtn,random", *flags, "--out", tmp_path / "a", "--json")
    assert done.json["calibration"] is None and all(row["perplexity"] > 1 for row in done.json["rows"])
    single = command("compress", "model", tmp_path / "c", *RTN).json
    assert done.json["rows"][0]["bytes"] == single["bytes_after"] and done.json["rows"][0]["error"] > 0
    page = (tmp_path / "a" / "comparison.html").read_text(encoding="utf-8")
    assert "relative error of the weights" in page
    other = command("compare", "model", "--methods", "rtn,gptq", *flags, "--out", tmp_path / "b")
    assert other.code == 1 and other.error.startswith("no calibration text")
