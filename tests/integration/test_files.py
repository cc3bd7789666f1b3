"""What a checkpoint's directory holds beside the weights, by whichever command it was written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import command, weights
from cospadi import compress, prune
from cospadi.checkpoint import export_dense, load, save
from cospadi.checkpoint.write import write_model
from tiny import save_tiny, tiny_model, tiny_text, token_ids

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
    (folder / "code_x.py").write_text(CODE)
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((folder / name).read_text())
        data["auto_map"] = {"AutoModelForCausalLM": "code_x.X", "AutoTokenizer": ["code_x.T", None]}
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
    assert (model / "code_x.py").read_text() == CODE


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
    assert write_model(model, None, tmp_path) == []
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.25


@pytest.fixture(scope="module")
def directories(model, tmp_path_factory):
    """A checkpoint of every kind, by name."""
    folder = tmp_path_factory.mktemp("kinds")
    compressed(model, folder / "compressed")
    depth(model, folder / "depth")
    width(model, folder / "width")
    shutil.copytree(model, folder / "dense")
    return folder


def altered(folder: Path, out: Path) -> Path:
    """A copy in which one bit of the last weight differs; it is still a finite number."""
    shutil.copytree(folder, out)
    file = sorted(out.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    return out


@pytest.mark.parametrize(
    ("name", "kind", "groups"),
    [("compressed", "compressed", 21), ("depth", "pruned", 0), ("width", "pruned", None), ("dense", "dense", 0)],
)
def test_every_kind_of_checkpoint_is_inspected(directories, name, kind, groups):
    done = command("inspect", directories / name, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["kind"], found["architecture"]) == (kind, "LlamaForCausalLM")
    assert len(found["groups"]) == groups if groups is not None else found["groups"]
    assert found["model"] == ("model" if name != "dense" else "dense") and found["checksums"] is (name != "dense")
    assert found["file_bytes"] == sum(path.stat().st_size for path in (directories / name).glob("model*.safetensors"))
    if groups == 0:
        model = load(directories / name)
        tensors = found["tensors"]
        assert found["parameters"] == model.num_parameters() == sum(row["parameters"] for row in tensors)
        assert sum(row["bytes"] for row in tensors) < found["file_bytes"]
        blocks = model.config.num_hidden_layers
        assert {"name": "model.layers.*.mlp.down_proj.weight", "count": blocks, "shape": [24, 44]}.items() <= next(
            row for row in tensors if row["name"].endswith("down_proj.weight")
        ).items()
    shown = command("inspect", directories / name).out
    assert kind in shown and found["model"] in shown and "every file" in shown
    assert ("3 → 2" in shown) is (name == "depth") and ("down_proj" in shown) is (groups == 0)


def test_a_pruned_checkpoint_is_exported_byte_for_byte(directories, tmp_path):
    for name in ("depth", "dense"):
        done = command("export", directories / name, tmp_path / name, "--dense", "--json")
        assert done.code == 0, done.err
        assert weights(tmp_path / name) == weights(directories / name)
        for kept in (*COMPANIONS, "tokenizer.json"):
            assert (tmp_path / name / kept).read_bytes() == (directories / name / kept).read_bytes()
        for page in ("report.json", "README.md", "recipe.yaml", "code_x.py", ".cospadi"):
            assert not (tmp_path / name / page).exists()
        assert "auto_map" not in (tmp_path / name / "config.json").read_text()
        assert command("inspect", tmp_path / name, "--json").json["checksums"] is True


def test_a_pruned_checkpoint_is_exported_in_another_type(directories, tmp_path):
    export_dense(directories / "depth", tmp_path / "out", dtype="float32")
    mine, theirs = load(tmp_path / "out"), load(directories / "depth", dtype=torch.float32)
    assert mine.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(mine(token_ids(1, 9)).logits, theirs(token_ids(1, 9)).logits)


@pytest.mark.parametrize("name", ["compressed", "depth", "width"])
def test_an_altered_bit_is_noticed_wherever_a_checkpoint_is_read(directories, tmp_path, name):
    bad = altered(directories / name, tmp_path / "bad")
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0], encoding="utf-8")
    for done in (
        command("inspect", bad),
        command("export", bad, tmp_path / "out", "--dense", *(["--dtype", "float32"] if name == "depth" else [])),
        command("export", bad, tmp_path / "out", "--dense"),
        command("generate", bad, "--prompt", "a"),
        command("evaluate", bad, "--text", text, "--seq-len", 32, "--max-blocks", 1),
    ):
        assert done.code == 1
        assert "its content is not what was written" in done.error or "no stock form" in done.error
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_noticed_in_a_dense_checkpoint(directories, tmp_path):
    shutil.copytree(directories / "dense", tmp_path / "bad")
    file = sorted((tmp_path / "bad").glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    for done in (command("inspect", tmp_path / "bad"), command("export", tmp_path / "bad", tmp_path / "o", "--dense")):
        assert done.code == 1 and name in done.error and "NaN" in done.error and file.name in done.error
    assert not (tmp_path / "o").exists()


def test_checksums_of_others_are_left_alone(directories, tmp_path):
    shutil.copytree(directories / "dense", tmp_path / "dense")
    (tmp_path / "dense/SHA256SUMS").write_text(f"{'0' * 64} *model.safetensors\n{'0' * 64}  README.md\n")
    assert command("inspect", tmp_path / "dense", "--json").json["checksums"] is False
    assert command("export", tmp_path / "dense", tmp_path / "out", "--dense").code == 0


def test_what_cannot_be_exported_says_why(directories, tmp_path):
    done = command("export", directories / "width", tmp_path / "out", "--dense")
    assert done.code == 1 and "no stock form" in done.error
    shutil.copytree(directories / "dense", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    export = ["export", tmp_path / "theirs", tmp_path / "out", "--dense"]
    for arguments in (export, [*export, "--dtype", "float32"], ["inspect", tmp_path / "theirs"]):
        done = command(*arguments)
        assert done.code == 1 and "'awq' of another package" in done.error
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/m"}')
    for arguments in (["export", tmp_path / "adapter", tmp_path / "out", "--dense"], ["inspect", tmp_path / "adapter"]):
        done = command(*arguments)
        assert done.code == 1 and "LORA adapter of org/m" in done.error and "merge_and_unload" in done.error
    done = command("export", tmp_path, tmp_path / "out", "--dense")
    assert done.code == 1 and "config.json: the file is missing" in done.error
    assert not (tmp_path / "out").exists()


def test_every_command_calls_an_adapter_an_adapter(tmp_path):
    adapter, text = tmp_path / "adapter", tmp_path / "text.txt"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/m"}')
    text.write_text(TEXTS[0], encoding="utf-8")
    out, calibration = tmp_path / "out", ["--calibration", text]
    for arguments in (
        ["compress", adapter, out, "--keep", "0.5", *calibration],
        ["compress", adapter, out, "--keep", "0.5", *calibration, "--dry-run"],
        ["estimate", adapter, "--keep", "0.5"],
        ["prune", adapter, out, "--blocks", "1", *calibration],
        ["compare", adapter, "--methods", "svd", "--keep", "0.5", "--text", text, *calibration, "--out", out],
        ["evaluate", adapter, "--text", text],
        ["generate", adapter, "--prompt", "a"],
        ["benchmark", adapter, "--quick"],
    ):
        done = command(*arguments)
        assert done.code == 1 and "LORA adapter of org/m" in done.error and "merge_and_unload" in done.error, arguments
        assert not out.exists()
