"""Pruning as a person meets it: the command, the checkpoint, the report, and what comes together with it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import cospadi
from command import command, snapshot, unchanged, weights
from cospadi.engine import outputs
from cospadi.engine import prune as prune_run
from cospadi.errors import BudgetError, RecipeError
from cospadi.recipe import Recipe
from tiny import byte_tokenizer, save_tiny, tiny_text, token_ids

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith("cospadi") for name in sys.modules)
sys.modules["cospadi"] = None  # any import of the package fails from here on
stock, separate = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(stock, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
ids = torch.arange(2, 14)[None]
print(model(ids).logits.detach().double().sum().item(), model.config.num_hidden_layers)
tokens = [model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=cached) for cached in (True, False)]
assert torch.equal(*tokens)
try:
    AutoModelForCausalLM.from_pretrained(separate)
except Exception as error:
    print("refused", type(error).__name__)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny_text(4000), encoding="utf-8")
    return path


@pytest.fixture
def flags(text):
    return ["--calibration", text, "--samples", 24, "--seq-len", 32]


def prune(model, out, *more, flags):
    return command("prune", model, out, *flags, *more)


def test_the_command_writes_a_whole_checkpoint_with_all_its_pages(model, tmp_path, flags):
    out = tmp_path / "out"
    with unchanged(model):
        done = prune(model, out, "--method", "replaceme", "--blocks", 2, "--json", flags=flags)
    assert done.code == 0, done.err
    report = done.json
    told = report["prune"]
    first, second = told["removed"]
    assert second == first + 1 and 1 <= first <= 3
    assert report["keep_actual"] == pytest.approx(3 / 5) and report["blocks_after"] == 3
    assert report["bytes_after"] * 5 == report["bytes_before"] * 3
    assert report["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert told["transforms"][0]["into"] == f"model.layers.{first - 1}.mlp.down_proj"
    assert len(report["distances"]["cosine"]) == 6
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "recipe.yaml", "report.json", "README.md", "report.html"}
    assert json.loads((out / "report.json").read_text())["prune"] == told
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["prune"] == {"method": "replaceme", "blocks": 2, "options": {}} and "keep" not in recipe
    page = (out / "report.html").read_text()
    assert "<script" not in page and "pruned by cospadi" in page
    card = (out / "README.md").read_text()
    assert f"{first}-{second}" in card and "import cospadi" not in card and str(tmp_path) not in card + page
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == 3 and loaded.dtype == torch.bfloat16
    assert command("generate", out, "--prompt", "abc", "--max-new-tokens", 3).code == 0


def test_the_heat_map_outlines_the_cut(model, tmp_path, flags):
    from cospadi.report.depth import heat_map

    out = tmp_path / "out"
    assert prune(model, out, "--method", "shortgpt", "--blocks", 2, flags=flags).code == 0
    report = json.loads((out / "report.json").read_text())
    figure = heat_map(report)
    boxes = {(patch.get_x(), patch.get_y()) for patch in figure.axes[0].patches}
    assert boxes == {(stop - 1.5, first - 0.5) for first, stop in report["prune"]["runs"]}
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert f"{report['distances']['cosine'][2][3]:.2f}" in shown
    assert (out / "assets/distances.png").stat().st_size > 1000
    assert page_figures(out) == 2


def page_figures(out):
    return (out / "report.html").read_text().count("<figure")


def test_python_and_command_give_the_same_bytes_and_a_second_run_finds_the_first(model, text, tmp_path, flags):
    result = cospadi.prune(
        model,
        tmp_path / "a",
        method="uidl",
        blocks=2,
        calibration=text,
        recipe=Recipe().merged({"calibration": {"samples": 24, "seq_len": 32}}),
    )
    assert not result.complete and result.keep_actual == pytest.approx(0.6) and len(result.removed) == 2
    assert prune(model, tmp_path / "b", "--method", "uidl", "--keep-blocks", 0.6, flags=flags).code == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    with unchanged(tmp_path / "b"):
        again = prune(model, tmp_path / "b", "--method", "uidl", "--keep-blocks", 0.6, flags=flags)
        assert again.code == 0 and "already complete" in again.err
        other = prune(model, tmp_path / "b", "--method", "uidl", "--blocks", 1, flags=flags)
        assert other.code == 1 and "other settings" in other.error and "--fresh" in other.error
    fresh = prune(model, tmp_path / "b", "--method", "uidl", "--blocks", 1, "--fresh", flags=flags)
    assert fresh.code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").config.num_hidden_layers == 4


@pytest.mark.parametrize("when", ["save", "report"])
def test_an_interrupted_run_leaves_nothing_that_looks_finished_and_is_done_again(
    model, tmp_path, flags, monkeypatch, when
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert prune(model, whole, "--blocks", 1, flags=flags).code == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    if when == "save":
        monkeypatch.setattr(outputs, "write_checksums", stop)
    else:
        monkeypatch.setattr(prune_run, "_recipe_yaml", stop)
    assert prune(model, out, "--blocks", 1, flags=flags).code == 130
    assert not (out / "report.json").exists()
    assert (out / "config.json").exists() == (when == "report")
    monkeypatch.undo()
    assert prune(model, out, "--blocks", 1, flags=flags).code == 0
    assert weights(out) == weights(whole)
    damaged = next(out.glob("model*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert "damaged" in prune(model, out, "--blocks", 1, flags=flags).error


def test_stock_results_need_no_package_and_others_say_so_loudly(model, tmp_path, flags):
    stock, separate = tmp_path / "stock", tmp_path / "separate"
    assert prune(model, stock, "--blocks", 2, flags=flags).code == 0
    done = prune(model, separate, "--blocks", 2, "--set", "separate=true", "--set", "ridge=0.1", "--json", flags=flags)
    assert done.code == 0 and done.json["stock"] is False and done.json["prune"]["added_bytes"] == 2 * 24 * 24
    assert "import cospadi" in (separate / "README.md").read_text()
    found = subprocess.run(
        [sys.executable, "-c", STOCK, str(stock), str(separate)],
        env=os.environ | {"COSPADI_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    total, blocks = found[0].split()
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(stock)(torch.arange(2, 14)[None]).logits.double().sum()
    assert float(total) == pytest.approx(float(here)) and blocks == "3"
    assert found[1].startswith("refused")
    # with the package it is a model like any other, but none that can be pruned or compressed again
    assert command("evaluate", separate, "--text", flags[1], "--seq-len", 32, "--json").code == 0
    for verb, size in (("prune", "--blocks=1"), ("compress", "--keep=0.7")):
        refused = command(verb, separate, tmp_path / "no", size, *flags)
        assert refused.code == 1 and "already compressed" in refused.error
        assert not (tmp_path / "no").exists()


def test_a_hybrid_model_is_pruned_and_generates(tmp_path, flags):
    lfm2 = {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"], "num_key_value_heads": 2}
    save_tiny(
        tmp_path / "lfm2", "lfm2", num_hidden_layers=5, intermediate_size=44, block_auto_adjust_ff_dim=False, **lfm2
    )
    done = prune(tmp_path / "lfm2", tmp_path / "out", "--method", "uidl", "--blocks", 2, "--json", flags=flags)
    assert done.code == 0, done.err
    kinds = [kind for index, kind in enumerate(lfm2["layer_types"]) if index not in done.json["prune"]["removed"]]
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == kinds
    assert command("generate", tmp_path / "out", "--prompt", "abc", "--max-new-tokens", 3).code == 0


def test_a_dry_run_tells_sizes_from_the_configuration_alone(model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    done = command("prune", bare, tmp_path / "out", "--method", "uidl", "--keep-blocks", 0.7, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["blocks_before"] == 5 and done.json["blocks_after"] == 3
    assert done.json["bytes_after"] * 5 == done.json["bytes_before"] * 3
    assert "5 → 4 blocks" in command("prune", bare, tmp_path / "out", "--blocks", 1, "--dry-run").out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--blocks", 5], 1, "cannot remove 5 of 5"),
        (["--blocks", 99], 1, "cannot remove 99 of 5"),
        (["--blocks", 0], 1, "prune.blocks cannot be 0: it must be at least 1"),
        (["--keep-blocks", 0.1, "--method", "uidl"], 1, "keep 0.1 is too small"),
        (["--keep-blocks", 1.5], 1, "less than 1"),
        (["--method", "sleb", "--blocks", 4], 1, "always stay"),
        (["--method", "replaceme", "--blocks", 4, "--set", "start=0"], 1, "start=0"),
        (["--method", "replaceme", "--blocks", 2, "--set", "start=4"], 1, "start=4"),
        (["--method", "uidle", "--blocks", 1], 1, "did you mean 'uidl'"),
        (["--method", "uidl", "--blocks", 1, "--set", "stat=1"], 1, "did you mean 'start'"),
        (["--blocks", 1, "--set", "ridge=-1"], 1, "option 'ridge' cannot be -1: it must be at least 0"),
        (["--blocks", 1, "--set", "ridge=.nan"], 1, "option 'ridge' cannot be nan: it must be a finite number"),
        (["--blocks", 1, "--set", "rank=0"], 1, "option 'rank' cannot be 0: it must be at least 1"),
        (["--blocks", 1, "--keep-blocks", 0.5], 2, "give one of them"),
        ([], 2, "no size given: pass --blocks"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(model, tmp_path, flags, more, code, said):
    done = prune(model, tmp_path / "out", *more, flags=flags)
    assert (done.code, said in done.error) == (code, True), done.err
    assert not (tmp_path / "out").exists()


def test_models_and_texts_that_cannot_be_used_are_refused(model, tmp_path, flags):
    done = command("prune", model, tmp_path / "out", "--blocks", 1)
    assert done.code == 1 and "no calibration text" in done.error
    config = T5Config(vocab_size=257, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    done = prune(tmp_path / "t5", tmp_path / "out", "--blocks", 1, flags=flags)
    assert done.code == 1 and "encoder-decoder" in done.error
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    done = prune(tmp_path / "broken", tmp_path / "out", "--blocks", 1, flags=flags)
    assert done.code == 1 and "model.layers.2.mlp.up_proj.weight: 1 of" in done.error
    assert not (tmp_path / "out").exists()


def test_little_text_is_warned_of_in_the_report(model, tmp_path, text):
    done = command(
        "prune", model, tmp_path / "o", "--blocks", 1, "--calibration", text, "--samples", 1, "--seq-len", 16
    )
    assert done.code == 0 and "16 tokens, fewer than the 24 dimensions" in " ".join(done.out.split())
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert any("fewer than the 24" in line for line in report["warnings"])


def test_a_pruned_checkpoint_can_be_compressed(model, tmp_path, flags):
    pruned, small = tmp_path / "pruned", tmp_path / "small"
    assert prune(model, pruned, "--blocks", 2, flags=flags).code == 0
    done = command("compress", pruned, small, "--keep", 0.7, "--method", "svd_llm", "--json", *flags)
    assert done.code == 0, done.err
    assert done.json["keep_actual"] <= 0.7 and len(done.json["groups"]) == 3 * 7
    assert command("generate", small, "--prompt", "abc", "--max-new-tokens", 3).code == 0


def test_one_recipe_prunes_and_compresses_under_one_budget(model, tmp_path, flags, text):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: svd_llm\nkeep: 0.5\nprune:\n  method: uidl\n  blocks: 2\n")
    out = tmp_path / "out"
    done = command("compress", model, out, "--recipe", path, "--json", *flags)
    assert done.code == 0, done.err
    report = done.json
    before = json.loads(command("estimate", model, "--keep", 0.5, "--json").out.splitlines()[-1])["bytes_before"]
    assert report["bytes_before"] == before and report["keep_requested"] == 0.5
    assert report["bytes_after"] == sum(group["bytes"] for group in report["groups"]) <= 0.5 * before
    assert report["bytes_after"] > 0.45 * before
    assert report["keep_actual"] == report["bytes_after"] / before
    assert len(report["prune"]["removed"]) == 2 and {group["layer"] for group in report["groups"]} == {0, 1, 2}
    loaded, _ = cospadi.load(out)
    assert loaded.config.num_hidden_layers == 3
    assert bool(loaded(token_ids(1, 9)).logits.isfinite().all())
    with unchanged(out):
        again = command("compress", model, out, "--recipe", path, *flags)
        assert again.code == 0 and "already complete" in again.err
    plan = command("compress", model, out, "--recipe", path, "--dry-run", "--json", *flags).json
    assert plan["bytes_before"] == before and plan["bytes_after"] == pytest.approx(report["bytes_after"], rel=0.02)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["keep"] == 0.5 and recipe["prune"]["blocks"] == 2
    enough = command("compress", model, tmp_path / "no", "--recipe", path, "--keep", 0.6, *flags)
    assert enough.code == 1 and "pruning alone keeps 0.6000" in enough.error
    with pytest.raises(BudgetError, match="pruning alone"):
        cospadi.estimate(model, Recipe.load(path).merged({"keep": 0.8}))
    with pytest.raises(RecipeError, match="layers of its own"):
        cospadi.compress(
            model,
            tmp_path / "no",
            calibration=text,
            recipe=Recipe.load(path).merged(
                {
                    "prune": {"method": "replaceme", "options": {"separate": True, "ridge": 0.1}},
                    "calibration": {"samples": 8, "seq_len": 32},
                }
            ),
        )
    assert not (tmp_path / "no").exists()


def test_compare_shows_pruned_models_beside_the_others(model, tmp_path, flags):
    out = tmp_path / "out"
    both = tmp_path / "both.yaml"
    both.write_text("method: svd_llm\nprune:\n  method: uidl\n  blocks: 1\n")
    words = ["--text", flags[1], "--eval-seq-len", 32, "--references", "none", "--recipe", f"both={both}"]
    words += ["--methods", "uidl,replaceme,sleb,svd_llm", "--keep", "0.7,0.1", "--set", "replaceme.ridge=0.1", "--save"]
    done = command("compare", model, "--out", out, "--json", *words, *flags)
    assert done.code == 0, done.err
    rows = {(row["method"], row["keep"]): row for row in done.json["rows"]}
    assert len(rows) == 10
    for name in ("uidl", "replaceme", "sleb"):
        row = rows[name, 0.7]
        assert len(row["removed"]) == 2 and row["keep_actual"] == pytest.approx(0.6)
        assert row["bytes"] == pytest.approx(0.6 * done.json["dense"]["bytes"])
        assert row["total_bytes"] < done.json["dense"]["total_bytes"]
        assert "one block must stay" in rows[name, 0.1]["reason"] or "always stay" in rows[name, 0.1]["reason"]
        folder = out / f"{name}-0.7"
        assert "pruned by cospadi" in (folder / "README.md").read_text()
        measured = command("evaluate", folder, "--text", flags[1], "--seq-len", 32, "--json").json["perplexity"]
        assert measured == pytest.approx(row["perplexity"], rel=0.02)  # there in bfloat16
    assert rows["replaceme", 0.7]["options"] == {"ridge": 0.1}
    assert rows["both", 0.7]["keep_actual"] <= 0.7 and rows["both", 0.7]["bytes"] > 0.65 * done.json["dense"]["bytes"]
    assert "replaceme" in (out / "comparison.svg").read_text() or not list(out.glob("*.svg"))
    before = snapshot(out)
    again = command("compare", model, "--out", out, "--json", *words, *flags)
    strip = [{k: v for k, v in row.items() if "seconds" not in k} for row in done.json["rows"]]
    assert [{k: v for k, v in row.items() if "seconds" not in k} for row in again.json["rows"]] == strip
    assert {k: v for k, v in snapshot(out).items() if k.startswith("uidl")} == {
        k: v for k, v in before.items() if k.startswith("uidl")
    }


def test_the_methods_are_listed(tmp_path):
    names = {row["name"] for row in command("methods", "--json").json["methods"]}
    assert names >= {"replaceme", "uidl", "shortgpt", "sleb", "laco", "llm_streamline", "magnitude", "random"}
    assert "ridge" in command("methods", "replaceme", "--json").json["methods"][0]["options"]
