"""Files beside the weights: what is copied, what never is, and what is removed from what is copied."""

import json
import os
import warnings
from pathlib import Path

import pytest

from cospadi.checkpoint import companions
from cospadi.checkpoint.companions import copy_companions, fetch_companions, remove_companions

KEPT = [
    "LICENSE",
    "LICENSE.txt",
    "Licence.md",
    "MODEL_LICENSE",
    "LICENSE-APACHE",
    "LICENSE.Apache-2.0",
    "NOTICE",
    "Notice.txt",
    "COPYING",
    "USE_POLICY.md",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "generation_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "tokenizer.model",
    "merges.txt",
]
LEFT = [
    "modeling_x.py",
    "LICENSE.py",
    "LICENSE.pkl",
    "license.sh",
    "preprocessor_config.py",
    "tokenizer.model.pkl",
    "pytorch_model.bin",
    "model.pt",
    "adapter_config.json",
    "README.md",
    "notes.txt",
    "unlicensed.txt",
    "params.json",
    "3_Other/config.json",
    "1_Pooling/code.py",
    "2_Dense/sub/config.json",
    ".git/config",
]
MODULES = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "../outside", "/etc", "2_Dense/sub", ".git")]


def put(folder: Path, name: str, content: bytes | None = None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(f"\r\n\u00e4 {name} \xff".encode("latin-1") if content is None else content)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    for name in (*KEPT, *LEFT):
        put(folder, name)
    put(folder, "modules.json", json.dumps(MODULES).encode())
    put(tmp_path, "outside/config.json")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_on_the_list_is_copied_byte_for_byte_and_nothing_else(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_companions(model, out)
    assert sorted(copied) == sorted(KEPT)
    assert content(out) == {name: (model / name).read_bytes() for name in KEPT}


def test_what_is_there_already_stays(model, tmp_path):
    out = tmp_path / "out"
    put(out, "merges.txt", b"ours")
    assert "merges.txt" not in copy_companions(model, out)
    assert (out / "merges.txt").read_bytes() == b"ours"


def test_a_model_without_a_directory_has_no_companions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("", "no/such-model", "not a name", "a/b/c/d"):
        assert copy_companions(source, tmp_path) == []


def test_links_out_of_the_directory_are_not_followed(model, tmp_path):
    put(tmp_path, "secret", b"secret")
    for name in ("LICENSE", "1_Pooling/config.json"):
        (model / name).unlink()
        (model / name).symlink_to(tmp_path / "secret")
    put(tmp_path, "elsewhere/config.json", b"secret")
    (model / "2_Dense").rename(tmp_path / "moved")
    (model / "2_Dense").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (model / "NOTICE").unlink()
    (model / "NOTICE").symlink_to("LICENSE.txt")
    (model / "COPYING").unlink()
    os.mkfifo(model / "COPYING")
    (model / "USE_POLICY.md").unlink()
    (model / "USE_POLICY.md").symlink_to("nowhere")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.warns(UserWarning, match="outside the model's directory") as caught:
        copied = copy_companions(model, out)
    assert len(caught) == 3
    gone = {"LICENSE", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "COPYING"}
    assert set(copied) == set(KEPT) - gone - {"USE_POLICY.md"}
    assert not any(b"secret" in data for data in content(out).values())
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "NOTICE").read_bytes() == (model / "LICENSE.txt").read_bytes()


def test_links_of_the_hub_cache_are_followed(tmp_path, monkeypatch):
    cache = tmp_path / "hub/models--org--name"
    put(cache, "blobs/abc", b"terms")
    put(cache, "snapshots/0/config.json", b"{}")
    (cache / "snapshots/0/LICENSE").symlink_to("../../blobs/abc")
    put(cache, "refs/main", b"0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for index, source in enumerate((cache / "snapshots/0", "org/name")):
        out = tmp_path / f"out{index}"
        out.mkdir()
        assert copy_companions(source, out) == ["LICENSE"]
        assert (out / "LICENSE").read_bytes() == b"terms" and not (out / "LICENSE").is_symlink()


def test_files_that_are_too_large_are_left_out(model, tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "LARGEST_TEXT", 1000)
    put(model, "LICENSE", b"x" * 1001)
    put(model, "2_Dense/model.safetensors", b"x" * 1001)
    with pytest.warns(UserWarning, match=r"LICENSE: was not copied, since it is unusually large \(1,001 bytes\)"):
        copied = copy_companions(model, tmp_path)
    assert "LICENSE" not in copied and "2_Dense/model.safetensors" in copied


def test_pickled_weights_of_a_module_are_told(model, tmp_path):
    put(model, "2_Dense/pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"2_Dense/pytorch_model\.bin: was not copied, since it is pickled"):
        assert "2_Dense/pytorch_model.bin" not in copy_companions(model, tmp_path)


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"path": 3}', b'[{"path": 3}, {}]', b"\xff"])
def test_a_list_of_modules_that_cannot_be_read_lists_none(model, tmp_path, damage):
    put(model, "modules.json", damage)
    copied = copy_companions(model, tmp_path)
    assert "modules.json" in copied and not any(name.startswith(("1_", "2_")) for name in copied)


def test_what_names_code_is_removed_wherever_it_stands(model, tmp_path):
    out, code = tmp_path / "out", {"AutoModel": "modeling_x.Model"}
    nested = {"auto_map": code, "custom_pipelines": {"x": {"impl": "x.X"}}, "text_config": {"auto_map": code, "a": "ä"}}
    put(out, "config.json", json.dumps(nested).encode())
    put(out, "tokenizer_config.json", json.dumps({"auto_map": code, "b": [1, {"auto_map": 2}]}).encode())
    put(model, "preprocessor_config.json", json.dumps({"auto_map": code, "size": 3}).encode())
    put(model, "processor_config.json", b'{"auto_map" ')
    copy_companions(model, out)
    assert json.loads((out / "config.json").read_bytes()) == {"text_config": {"a": "ä"}}
    assert json.loads((out / "tokenizer_config.json").read_bytes()) == {"b": [1, {}]}
    assert json.loads((out / "preprocessor_config.json").read_bytes()) == {"size": 3}
    assert (out / "processor_config.json").read_bytes() == b'{"auto_map" '


def test_only_what_may_be_copied_is_removed_again(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_companions(model, out)
    put(out, "mine.txt")
    put(out, "2_Dense/mine.txt")
    outside = ["../model/LICENSE", "/etc/passwd", "../model/1_Pooling/config.json"]
    remove_companions(out, [*copied, "mine.txt", *outside, 3])
    assert set(content(out)) == {"mine.txt", "2_Dense/mine.txt"} and not (out / "1_Pooling").exists()
    assert (model / "LICENSE").exists() and (model / "1_Pooling/config.json").exists()
    for damaged in (None, 3, {"a": 1}, "LICENSE"):
        remove_companions(out, damaged)


def test_companions_on_the_hub_are_fetched_when_the_model_is(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fetch_companions(str(tmp_path))
    fetch_companions("")
    assert asked == []
    fetch_companions("org/name")
    assert asked[0][0] == "org/name" and "modules.json" in asked[0][1]["allow_patterns"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetch_companions("org/name")
    assert len(asked) == 1


def test_companions_that_cannot_be_fetched_are_a_warning(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.warns(UserWarning, match=r"org/name: its licence .* cannot be fetched \(OSError\)"):
        fetch_companions("org/name")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch_companions(".")
