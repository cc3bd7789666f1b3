"""The embedded model and the texts that belong to it."""

import hashlib
import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from cospadi import embedded
from cospadi.embedded import CALIBRATION_MODULES, HELDOUT_MODULES, model_path, stdlib_sources, stdlib_texts
from cospadi.errors import CalibrationError, ModelError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def library(root: Path, texts: dict[str, str] | None = None) -> Path:
    """A library of all listed modules, and of `texts` by path, stored as Latin-1."""
    for name in (*HELDOUT_MODULES, *CALIBRATION_MODULES):
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n", encoding="utf-8")
    for name, text in (texts or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    return root


def test_model_is_small_and_has_no_code_or_pickle():
    found = list(model_path().iterdir())
    assert {path.suffix for path in found} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in found) <= 6_000_000


def test_model_is_a_stock_llama_in_bfloat16(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_path())
    config = model.config
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert model.dtype == torch.bfloat16
    assert config.num_attention_heads % config.num_key_value_heads == 0 < config.num_key_value_heads
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.vocab_size == len(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert {config.bos_token_id, config.eos_token_id, config.pad_token_id} == {end}
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {end}


def test_generates_what_belongs_in_a_program(model, tokenizer):
    prompt = tokenizer("import os\nimport sys\n\nclass Reader:\n    def __init__(", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    start = prompt["input_ids"].shape[1]
    assert tokenizer.decode(made[start:]).startswith("self")
    with torch.inference_mode():
        assert made[start:].equal(model(input_ids=made[None, :-1]).logits[0, start - 1 :].argmax(-1))


def test_predicts_heldout_source(model, tokenizer):
    # 2048 tokens: an untrained model has a perplexity of at least that, one that knows frequencies alone some hundreds.
    texts = stdlib_texts("heldout")
    ids = [tokenizer.backend_tokenizer.encode(text).ids[:512] for text in texts[:6]]
    blocks = torch.tensor([block for block in ids if len(block) == 512])
    with torch.inference_mode():
        logits = model(input_ids=blocks).logits[:, :-1].double()
    nats = functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert len(blocks) >= 5
    assert math.exp(nats) < 20


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t\tx = 1\r\n   \r\n\n",
        "def f(self, *args, _x=0x1F, **kw) -> 'Größe':  # 日本語 🙂 e\u0301\n    return self.__dict__[...]",
        "\x00\x7f\ufeff\u2028 trailing   ",
        "12345678 3.14159e-10 ||>>=<|endoftext",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokenizer_gives_source_back_and_adds_nothing(tokenizer):
    for text in stdlib_texts("heldout")[:4]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
        assert len(text.encode()) / len(ids) > 2.5


def test_parts_of_the_running_library_do_not_overlap():
    parts = {part: dict(stdlib_sources(part)) for part in ("train", "calibration", "heldout")}
    assert len(parts["heldout"]) == len(HELDOUT_MODULES)
    assert len(parts["calibration"]) == len(CALIBRATION_MODULES)
    assert not set(parts["heldout"]) & set(parts["train"])
    assert not set(parts["heldout"].values()) & set(parts["train"].values())
    assert parts["calibration"].items() <= parts["train"].items()
    assert list(parts["train"]) == sorted(parts["train"])
    assert sum(len(text) for text in parts["train"].values()) > 5_000_000
    assert stdlib_texts("train") == list(parts["train"].values())


def test_calibration_fills_128_sequences_of_512(tokenizer):
    wanted, tokens = 128 * 512, 0
    for text in stdlib_texts("calibration"):
        if tokens < wanted:
            tokens += len(tokenizer.backend_tokenizer.encode(text).ids)
    assert tokens >= wanted


def test_training_text_leaves_out_tests_additions_and_what_is_not_utf8(tmp_path):
    root = library(
        tmp_path,
        {
            "mine.py": "x = 'ok'\r\ny = 1\n",
            "notes.txt": "not Python",
            "json/tests/test_all.py": "test",
            "test/support.py": "test",
            "site-packages/foreign.py": "foreign",
            "config-3/other.py": "other",
            "_sysconfigdata_linux.py": "built",
            "broken.py": "x = '\xe9'",
            "empty.py": "",
        },
    )
    sources = dict(stdlib_sources("train", root))
    assert sources.pop("mine.py") == "x = 'ok'\ny = 1\n"
    assert set(sources.values()) == {f"# {name}\n" for name in CALIBRATION_MODULES}


def test_heldout_module_that_is_a_package_stays_out_of_training(tmp_path):
    texts = {"argparse/__init__.py": "package", "argparse/_helper.py": "helper", "argparsers.py": "another"}
    root = library(tmp_path, texts)
    (root / "argparse.py").unlink()
    train = dict(stdlib_sources("train", root))
    assert not [name for name in train if name.startswith("argparse/")]
    assert train["argparsers.py"] == "another"
    assert dict(stdlib_sources("heldout", root))["argparse/__init__.py"] == "package"


@pytest.mark.parametrize("part", ["train", "calibration", "heldout"])
def test_missing_source_is_one_clear_error(tmp_path, part):
    with pytest.raises(CalibrationError, match=r"no standard-library source in .*zipped"):
        stdlib_texts(part, tmp_path / "python311.zip")
    with pytest.raises(CalibrationError, match="missing in"):
        stdlib_texts(part, tmp_path)


def test_stripped_library_names_the_missing_module(tmp_path):
    root = library(tmp_path)
    (root / "heapq.py").unlink()
    assert len(stdlib_texts("calibration", root)) == len(CALIBRATION_MODULES)
    with pytest.raises(CalibrationError, match="source of heapq is missing"):
        stdlib_texts("heldout", root)


def test_unknown_part():
    with pytest.raises(ValueError, match="train, calibration, heldout"):
        stdlib_texts("validation")


def test_missing_model_files_are_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="without its data files"):
        model_path()


def test_import_does_not_need_torch():
    code = "import sys, cospadi.embedded as e; e.model_path(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_recorded_result_is_that_of_the_shipped_files():
    record = json.loads((ROOT / "benchmarks/results/embedded_model.json").read_text(encoding="utf-8"))
    recorded = {name: entry["sha256"] for name, entry in record["embedded"]["files"].items()}
    shipped = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model_path().iterdir()}
    assert shipped == recorded
    runs = record["repeated_short_run"]["runs"]
    assert len(runs) == 2 and len({run["weights_sha256"] for run in runs}) == 1


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_embedded", ROOT / "scripts/train_embedded.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_training_repeats_bit_for_bit_and_learns(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(400)]

    def text(length: int) -> str:
        return "".join(f"{draw.choice(words)}({draw.choice(words)})\n    " for _ in range(length))

    parts = {"train": [(f"{i}.py", text(120)) for i in range(6)], "heldout": [("h.py", text(250))]}
    corpus = script.Corpus(parts, "3.11.0")
    file = tmp_path / "corpus.jsonl"
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(corpus.lines())
    assert script.read_corpus(file) == corpus
    assert hashlib.sha256(file.read_bytes()).hexdigest() == corpus.sha256()

    def run(name: str, seed: int) -> dict:
        short = ["--steps", "12", "--batch", "2", "--length", "48", "--device", "cpu", "--seed", str(seed)]
        paths = ["--corpus", str(file), "--out", str(tmp_path / name), "--report", str(tmp_path / f"{name}.json")]
        assert script.main([*paths, *short, "--validate-every", "3"]) == 0
        return json.loads((tmp_path / f"{name}.json").read_text())

    first, again, other = run("first", 1), run("again", 1), run("other", 2)
    assert first["files"] == again["files"]
    assert first["heldout"] == again["heldout"]
    assert first["files"]["tokenizer.json"] == other["files"]["tokenizer.json"]
    assert first["files"]["model.safetensors"] != other["files"]["model.safetensors"]
    assert first["corpus"]["files"] == 4
    assert first["training"]["tokens_seen"] == 12 * 2 * 48
    assert first["training"]["losses"][-1][1] < first["training"]["losses"][0][1] - 0.5
    assert 1 < first["validation"]["perplexity"] < 1500


def test_batches_cover_the_stream_in_another_order_every_pass(script):
    stream = torch.arange(10 * 8 + 1)
    blocks = list(script.batches(stream, steps=12, batch=3, length=8, seed=3))
    assert all(block.shape == (3, 9) for block in blocks)
    assert all(bool((block.diff(dim=1) == 1).all()) for block in blocks)
    starts = torch.stack([block[:, 0] for block in blocks]).view(-1, 9)  # three steps a pass: nine blocks of nine
    assert all(len(set(one.tolist())) == 9 for one in starts)
    assert len({tuple(one.tolist()) for one in starts}) == 4


def test_learning_rate_rises_once_then_falls(script):
    rates = [script.learning_rate(step, 1000, 0.01) for step in range(1000)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.01)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.0002
