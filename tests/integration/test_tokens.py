"""Text becomes tokens in the same way in every command: with the BOS that the tokenizer adds, within the vocabulary."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cospadi
from command import command, unchanged
from tiny import bos_tokenizer, byte_tokenizer, save_tiny, tiny_text

CALIBRATION = ("--samples", "4", "--seq-len", "16")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    save_tiny(folder / "model", tokenizer=bos_tokenizer(), vocab_size=258, dtype=torch.float32)
    (folder / "text.txt").write_text(tiny_text(600), encoding="utf-8")
    added = byte_tokenizer()
    added.add_tokens("<added>")
    save_tiny(folder / "short", tokenizer=added)
    (folder / "added.txt").write_text(tiny_text(600) + "<added>" + tiny_text(600), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.mark.parametrize("prompt", ["ab cd", "<bos>ab cd", ""])
def test_generation_is_that_of_transformers(prompt):
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    ids = tokenizer(prompt.removeprefix("<bos>"), return_tensors="pt")
    assert ids.input_ids[0, 0] == 257
    wanted = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, ids.input_ids.shape[1] :]
    done = command("generate", "model", "--prompt", prompt, "--max-new-tokens", 8, "--device", "cpu", "--json")
    assert done.json["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert done.json["prompt_tokens"] == ids.input_ids.shape[1]
    off = command("generate", "model", "--prompt", "ab", "--max-new-tokens", 1, "--bos", "off", "--json").json
    assert off["prompt_tokens"] == 2


def test_what_a_run_began_its_sequences_with_is_in_its_result(tmp_path):
    flags = ("--keep", "0.5", "--method", "svd", "--calibration", "text.txt", *CALIBRATION, "--device", "cpu", "--json")
    auto = command("compress", "model", tmp_path / "auto", *flags).json
    off = command("compress", "model", tmp_path / "off", *flags, "--bos", "off").json
    on = command("compress", "model", tmp_path / "on", *flags, "--bos", "on").json
    told = [(run["calibration"]["bos"], run["calibration"]["begins_with"]) for run in (auto, off, on)]
    assert told == [("auto", "<bos>"), ("off", ""), ("on", "<bos>")]
    assert auto["calibration"]["sha256"] == on["calibration"]["sha256"] != off["calibration"]["sha256"]
    assert "bos: 'off'" in (tmp_path / "off" / "recipe.yaml").read_text(encoding="utf-8")
    assert "&lt;bos&gt;" in (tmp_path / "auto" / "report.html").read_text(encoding="utf-8")
    pruned = command(
        "prune", "model", tmp_path / "p", "--blocks", 1, "--calibration", "text.txt", *CALIBRATION, "--device", "cpu",
        "--json",
    ).json  # fmt: skip
    assert pruned["calibration"]["begins_with"] == "<bos>"
    measure = ("--text", "text.txt", "--seq-len", "16", "--device", "cpu", "--json")
    found = command("evaluate", tmp_path / "auto", "--against", "model", *measure).json
    assert found["bos"] == "auto" and found["begins_with"] == found["dense_begins_with"] == "<bos>"
    assert found["tokens"] == 600 // 15 * 14
    without = command("evaluate", tmp_path / "auto", *measure, "--bos", "off").json
    assert without["tokens"] == 600 // 16 * 15 and without["begins_with"] == ""


def test_a_comparison_calibrates_and_measures_alike(tmp_path):
    flags = (
        "--methods",
        "svd",
        "--keep",
        "0.5",
        "--references",
        "none",
        "--text",
        "text.txt",
        "--calibration",
        "text.txt",
    )
    flags = (*flags, *CALIBRATION, "--eval-seq-len", "16", "--device", "cpu", "--json")
    found = command("compare", "model", *flags, "--out", tmp_path / "a").json
    assert found["calibration"]["begins_with"] == found["dense"]["texts"]["text.txt"]["begins_with"] == "<bos>"
    off = command("compare", "model", *flags, "--out", tmp_path / "a", "--bos", "off").json
    assert off["calibration"]["begins_with"] == off["dense"]["texts"]["text.txt"]["begins_with"] == ""
    assert off["dense"]["perplexity"] != found["dense"]["perplexity"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "short", "out", "--keep", "0.5", "--calibration", "added.txt"),
        ("prune", "short", "out", "--blocks", "1", "--calibration", "added.txt"),
        ("evaluate", "short", "--text", "added.txt", "--seq-len", "32"),
        ("generate", "short", "--prompt", "a <added>"),
        ("compare", "short", "--methods", "svd", "--keep", "0.5", "--text", "text.txt", "--calibration", "added.txt",
         "--out", "rows"),
        ("evaluate", "short", "--tasks", "task.jsonl"),
    ],
)  # fmt: skip
def test_a_token_beyond_the_vocabulary_is_named_before_the_work(arguments, place):
    (place / "task.jsonl").write_text(json.dumps({"text": "one <added> two"}) + "\n", encoding="utf-8")
    extra = ("--samples", 999, "--seq-len", 16) if "--calibration" in arguments else ()
    with unchanged(place / "out"):
        done = command(*arguments, *extra, "--device", "cpu")
    assert done.code == 1
    assert done.error.startswith(
        "the token '<added>' has id 257, but the model's vocabulary has 257 tokens: it was added to the tokenizer"
    )


def test_from_python(place):
    assert cospadi.evaluate("model", text="text.txt", seq_len=16, device="cpu", bos="off")["begins_with"] == ""
    with pytest.raises(cospadi.errors.RecipeError, match="bos must be auto, on or off"):
        cospadi.evaluate("model", text="text.txt", bos="none")
