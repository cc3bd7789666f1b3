"""What a checkpoint's directory holds beside the weights, by whichever command it was written."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cospadi import compress, prune
from cospadi.checkpoint import export_dense, load, save
from tiny import save_tiny, tiny_model, tiny_text

TEXTS = [tiny_text(6000)]
TEXT = {"calibration": {"samples": 8, "seq_len": 32}}
COMPANIONS = {
    "LICENSE": b"Terms\r\n",
    "preprocessor_config.json": b'{ "size":3 }',
    "generation_config.json": b'{"temperature": 0.6, "top_k": 7, "eos_token_id": 256}',
    "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}]',
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens":true}\n',
}
CODE = "raise SystemExit('this must never run')\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint as it is released: with a licence, code, settings without effect, and files of other libraries."""
    folder = save_tiny(tmp_path_factory.mktemp("files") / "model")
    (folder / "1_Pooling").mkdir()
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    (folder / "modeling_x.py").write_text(CODE)
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((folder / name).read_text())
        data["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["modeling_x.T", None]}
        (folder / name).write_text(json.dumps(data))
    return folder


def compressed(model: Path, out: Path, **changes) -> None:
    compress(model, out, recipe=TEXT | {"method": "svd", "keep": 0.7} | changes, calibration=TEXTS)


def shared(model: Path, out: Path) -> None:
    compressed(model, out, method="masa", keep=0.6)


def depth(model: Path, out: Path) -> None:
    prune(model, out, method="uidl", blocks=1, recipe=TEXT, calibration=TEXTS)


def width(model: Path, out: Path) -> None:
    prune(model, out, method="slicegpt", keep_blocks=0.8, recipe=TEXT, calibration=TEXTS)


def exported(model: Path, out: Path) -> None:
    compressed(model, out.with_name("small"))
    export_dense(out.with_name("small"), out)


def by_hand(model: Path, out: Path) -> None:
    compressed(model, out.with_name("small"))
    config = json.loads((out.with_name("small") / "config.json").read_text())
    loaded = load(out.with_name("small"))
    specs = loaded.hf_quantizer._format.parse(config["quantization_config"])
    save(loaded, AutoTokenizer.from_pretrained(out.with_name("small")), out, specs)


@pytest.mark.parametrize("write", [compressed, shared, depth, width, exported, by_hand])
def test_what_belongs_to_the_model_comes_along_and_code_does_not(model, tmp_path, write):
    out = tmp_path / "out"
    write(model, out)
    for name, content in COMPANIONS.items():
        assert (out / name).read_bytes() == content, name
    assert not any(path.suffix in (".py", ".bin", ".pt", ".pkl") for path in out.rglob("*"))
    assert not any("auto_map" in path.read_text() for path in out.rglob("*.json") if ".cospadi" not in path.parts)
    opened = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert opened.generation_config.top_k == 7 and opened.generation_config.temperature == 0.6
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (model / "modeling_x.py").read_text() == CODE


def test_a_fresh_run_takes_the_companions_of_the_other_model_away(model, tmp_path):
    out = tmp_path / "out"
    compressed(model, out)
    (out / "mine.txt").write_text("mine")
    plain = save_tiny(tmp_path / "plain", seed=1)
    (plain / "NOTICE").write_text("notice")
    compress(plain, out, recipe=TEXT | {"method": "svd", "keep": 0.7}, calibration=TEXTS, fresh=True)
    assert not (out / "LICENSE").exists() and not (out / "1_Pooling").exists() and not (out / "modules.json").exists()
    assert (out / "NOTICE").read_text() == "notice" and (out / "mine.txt").read_text() == "mine"


def test_a_target_size_counts_the_companions(model, tmp_path):
    larger = tmp_path / "larger"
    shutil.copytree(model, larger)
    (larger / "LICENSE").write_bytes(b"x" * 20_000)
    for source, out in ((model, tmp_path / "out"), (larger, tmp_path / "smaller")):
        target = 72_000 if source == model else 92_000
        compress(source, out, recipe=TEXT | {"method": "svd"}, target_size=str(target), calibration=TEXTS)
        pages = ("report.json", "report.html", "README.md", "recipe.yaml", "fingerprint.json")
        files = [path for path in out.rglob("*") if path.is_file() and path.name not in pages]
        total = sum(path.stat().st_size for path in files if "assets" not in path.parts)
        assert 0.9 * target < total <= target


def test_settings_changed_in_memory_are_the_ones_that_are_saved(model, tmp_path):
    compressed(model, tmp_path / "small")
    loaded = load(tmp_path / "small")
    loaded.generation_config.temperature = 0.25  # still without effect
    config = json.loads((tmp_path / "small/config.json").read_text())
    save(loaded, None, tmp_path / "out", loaded.hf_quantizer._format.parse(config["quantization_config"]))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.25
    assert loaded.generation_config.temperature == 0.25


def test_a_model_of_no_directory_gets_its_own_settings(tmp_path):
    model = tiny_model()
    model.generation_config.temperature = 0.25
    from cospadi.checkpoint.write import write_model

    assert write_model(model, None, tmp_path) == []
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.25
