"""Text as people have it, through the commands and from Python."""

import io
import json
import sys

import pytest
from datasets import Dataset, IterableDataset

import cospadi
from command import command
from tiny import bos_tokenizer, byte_tokenizer, save_tiny, tiny_text

TEMPLATE = "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
FLAGS = ("--keep", "0.5", "--method", "svd", "--samples", "4", "--seq-len", "16", "--device", "cpu", "--json")
MEASURE = ("--seq-len", "16", "--device", "cpu", "--json")
TEXT = tiny_text(400)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_tiny(folder / "chat", tokenizer=tokenizer, vocab_size=258)
    save_tiny(folder / "plain", tokenizer=byte_tokenizer())
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    records = [{"messages": [{"role": "user", "content": tiny_text(90, seed=i)}], "body": TEXT} for i in range(9)]
    (folder / "many" / "deep").mkdir(parents=True)
    (folder / "many" / "deep" / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def test_conversations_in_a_directory(tmp_path):
    report = command("compress", "chat", tmp_path / "c", *FLAGS, "--calibration", "many").json
    told = report["calibration"]
    assert (told["source"], told["fields"], told["documents"]) == ("many", ["messages"], 9)
    assert len(told["chat_template"]) == 12 and told["notes"][0] == "1 files: 1 .jsonl"
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "messages" in page and told["chat_template"] in page
    found = command("evaluate", tmp_path / "c", "--text", "many", *MEASURE).json
    assert found["fields"] == ["messages"] and found["text"] == "many" and found["perplexity"] > 1
    done = command("compress", "plain", tmp_path / "p", *FLAGS, "--calibration", "many")
    assert done.code == 1 and "a.jsonl: line 1 is a conversation" in done.error and "no chat template" in done.error


def test_another_field_in_every_command(tmp_path):
    field = ("--text-field", "body")
    base = ("--calibration", "many/deep/a.jsonl", *field)
    assert command("compress", "plain", tmp_path / "c", *FLAGS, *base).json["calibration"]["fields"] == ["body"]
    assert "field: body" in (tmp_path / "c" / "recipe.yaml").read_text(encoding="utf-8")
    pruned = command("prune", "plain", tmp_path / "p", "--blocks", 1, *FLAGS[4:], *base).json
    assert pruned["calibration"]["fields"] == ["body"]
    found = command("evaluate", "plain", "--text", "many", *field, *MEASURE).json
    assert found["fields"] == ["body"]
    compared = command(
        "compare", "plain", "--methods", "svd", "--references", "none", *FLAGS[:2], *FLAGS[4:], *base, "--text", "many",
        "--eval-seq-len", 16, "--out", tmp_path / "rows",
    ).json  # fmt: skip
    assert compared["calibration"]["fields"] == ["body"]
    assert compared["dense"]["perplexity"] == pytest.approx(found["perplexity"], rel=0.02)
    for arguments in (
        ("compress", "plain", tmp_path / "x", *FLAGS, *base[:2]),
        ("evaluate", "plain", "--text", "many"),
    ):
        done = command(*arguments, "--text-field", "nope")
        assert done.code == 1 and "line 1 has no field 'nope' (it has 'messages', 'body')" in done.error


def test_standard_input(tmp_path, monkeypatch):
    def piped(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    wanted = command("evaluate", "plain", "--text", "text.txt", "--against", "plain", *MEASURE).json
    piped(json.dumps({"text": TEXT}) + "\n")
    found = command("evaluate", "plain", "--text", "-", "--against", "plain", *MEASURE).json
    assert found["perplexity"] == wanted["perplexity"] == found["dense_perplexity"]
    assert found["text"] == "standard input"
    piped(TEXT)
    piped_run = command("compress", "plain", tmp_path / "a", *FLAGS, "--calibration", "-").json["calibration"]
    filed = command("compress", "plain", tmp_path / "b", *FLAGS, "--calibration", "text.txt").json["calibration"]
    assert piped_run["sha256"] == filed["sha256"] and piped_run["source"] == "standard input"
    done = command(
        "compare", "plain", "--methods", "svd", "--keep", "0.5", "--text", "-", "--calibration", "-", "--out", "o"
    )
    assert done.code == 2 and "only once" in done.err


def test_from_python(tmp_path):
    data = Dataset.from_dict({"text": [TEXT], "body": ["x"]})
    sources = {
        "a Dataset": data,
        "an IterableDataset": IterableDataset.from_generator(lambda: iter([{"text": TEXT}])),
        "a Column": data["text"],
        "a generator": (text for text in [TEXT]),
        "a list of documents": [TEXT],
    }
    calibration = {"samples": 4, "seq_len": 16}
    digests = set()
    for number, (name, source) in enumerate(sources.items()):
        recipe = {"method": "svd", "keep": 0.5, "device": "cpu", "calibration": calibration}
        report = cospadi.compress("plain", tmp_path / str(number), calibration=source, recipe=recipe).report
        assert report["calibration"]["source"] == report["recipe"]["calibration"]["source"] == name
        digests.add(report["calibration"]["sha256"])
    assert len(digests) == 1
    found = cospadi.evaluate("plain", text=(text for text in [TEXT]), against="plain", seq_len=16, device="cpu")
    assert found["text"] == "a generator" and found["perplexity"] == found["dense_perplexity"]
    named = cospadi.evaluate("plain", text=[{"body": TEXT}], text_field="body", seq_len=16, device="cpu")
    assert named["perplexity"] == found["perplexity"] and named["fields"] == ["body"]
