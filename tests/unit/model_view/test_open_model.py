import json
import shutil
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from huggingface_hub import errors
from transformers import T5Config

from cospadi import compress, evaluate, generate, load, prune
from cospadi.errors import ModelError
from cospadi.evaluation.compare import compare
from cospadi.model_view import (
    locating,
    model_name,
    open_config,
    open_model,
    open_tokenizer,
    skeleton,
)
from tiny import ARCHITECTURES, byte_tokenizer, save_tiny, tiny_config, tiny_model


@pytest.fixture
def saved(tmp_path):
    return save_tiny(tmp_path / "model")


def edit_config(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(path, opener=open_model):
    with pytest.raises(ModelError) as caught:
        opener(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_comes_back(tmp_path, architecture):
    path = save_tiny(tmp_path, architecture, dtype=torch.bfloat16)
    assert len(list(path.glob("*.safetensors"))) > 1
    model, tokenizer = open_model(str(path))
    assert model.dtype == torch.bfloat16 and not model.training
    expected = tiny_model(architecture, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert tokenizer("é\n", add_special_tokens=False)["input_ids"] == list("é\n".encode())


def test_tied_head_is_not_missing(tmp_path):
    model, _ = open_model(save_tiny(tmp_path, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "~/no such model", "../x"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # what lies beside the checkout is not ours to know
    assert "no such directory" in refusal(name)


def test_a_file_is_not_a_model(saved):
    assert "is a file" in refusal(saved / "config.json")


def test_no_config(saved):
    (saved / "config.json").unlink()
    assert "no config.json" in refusal(saved)


def test_malformed_config(saved):
    (saved / "config.json").write_text("{")
    assert "config.json" in refusal(saved)


def test_unknown_model_type(saved):
    edit_config(saved, model_type="frobnicate", architectures=["FrobnicateForCausalLM"])
    assert "frobnicate" in refusal(saved)


def test_code_in_the_checkpoint_is_never_run(saved):
    edit_config(saved, model_type="frobnicate", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (saved / "code.py").write_text("raise SystemExit('ran')")
    assert "never run" in refusal(saved)


def test_encoder_decoder(tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    message = refusal(tmp_path, open_config)
    assert "T5ForConditionalGeneration" in message and "encoder-decoder" in message


def test_not_a_language_model(saved):
    edit_config(saved, model_type="vit", architectures=["ViTModel"])
    assert "ViTModel" in refusal(saved)


def test_no_tokenizer(saved):
    for file in saved.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(saved)


def test_malformed_tokenizer(saved):
    (saved / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in refusal(saved)


def test_truncated_weights(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) - 100])
    message = refusal(saved)
    assert shard.name in message and f"{len(data):,}" in message


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (8).to_bytes(8, "little") + b'{"a":1}}' + b"0" * 50])
def test_unreadable_weights(saved, content):
    shard = sorted(saved.glob("*.safetensors"))[0]
    shard.write_bytes(content)
    assert shard.name in refusal(saved)


def test_missing_shard(saved):
    shard = sorted(saved.glob("*.safetensors"))[-1]
    shard.unlink()
    assert shard.name in refusal(saved)


def test_a_shard_outside_the_directory_is_refused(saved):
    index = saved / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    outside = saved.parent / "outside.safetensors"
    shutil.copy(saved / content["weight_map"][first], outside)
    content["weight_map"][first] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    assert "../outside.safetensors" in refusal(saved)


def test_no_weights_and_pickled_weights(saved):
    for file in saved.glob("model*"):
        file.unlink()
    assert "no weights" in refusal(saved)
    (saved / "pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refusal(saved)


def test_weights_that_do_not_fill_the_model(saved):
    edit_config(saved, num_hidden_layers=4)
    message = refusal(saved)
    assert "layers.3" in message and "missing" in message


def test_weights_that_no_layer_takes_are_told(saved):
    edit_config(saved, num_hidden_layers=2)
    with pytest.warns(UserWarning, match=r"9 stored weights are not part of the model \(first: model\.layers\.2"):
        model, _ = open_model(saved)
    assert len(model.model.layers) == 2


def test_weights_of_another_shape(saved):
    edit_config(saved, intermediate_size=40)
    message = refusal(saved)
    assert "down_proj.weight is (24, 44), not (24, 40)" in message


def test_a_format_that_transformers_does_not_know_is_refused(saved):
    edit_config(saved, quantization_config={"quant_method": "nobody_knows"})
    assert "does not know its format 'nobody_knows'" in refusal(saved)


def test_skeleton_takes_no_memory_at_any_size():
    config = tiny_config(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64, head_dim=128
    )
    model = skeleton(config)
    assert sum(p.numel() for p in model.parameters()) > 3e9
    assert all(tensor.device.type == "meta" for tensor in model.parameters())


def test_tokenizer_is_exact_and_has_an_end():
    tokenizer = byte_tokenizer()
    text = "naïve\t日本\x00 <b>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers as `answer` says: an exception, or None for a model that is there. Lists what it was asked."""

    class Hub:
        answer: Exception | None = ConnectionError("no route")
        asked: ClassVar[list[tuple[str, float]]] = []

    def metadata(url, *, timeout):
        Hub.asked.append((url, timeout))
        if Hub.answer is not None:
            raise Hub.answer

    Hub.asked.clear()
    locating._kept.cache_clear()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    locating._kept.cache_clear()


def http_error(kind, status):
    return kind("told", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_a_hub_that_cannot_be_reached_is_asked_once_and_not_for_long(hub):
    message = refusal("nobody/nothing-of-that-name")
    assert "neither a local directory nor a hub model" in message and "cannot be reached (ConnectionError)" in message
    assert len(hub.asked) == 1
    url, timeout = hub.asked[0]
    assert url.endswith("/nobody/nothing-of-that-name/resolve/main/config.json") and timeout <= 5


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), "no such model on the hub"),
        (http_error(errors.RevisionNotFoundError, 404), "no revision 'main'"),
        (http_error(errors.GatedRepoError, 403), "accept its licence"),
        (http_error(errors.RemoteEntryNotFoundError, 404), "no readable config.json (HTTP 404)"),
        (http_error(errors.HfHubHTTPError, 503), "does not answer (HTTP 503)"),
    ],
)
def test_what_the_hub_says_is_told_in_one_line(hub, answer, words):
    hub.answer = answer
    assert words in refusal("nobody/nothing-of-that-name", open_config)
    assert len(hub.asked) == 1


def test_a_hub_that_is_switched_off_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal("nobody/nothing-of-that-name")
    assert hub.asked == []


def test_without_the_hub_a_cached_model_opens(hub, monkeypatch, tmp_path, saved):
    snapshot = tmp_path / "cache" / "models--some--tiny" / "snapshots" / "abc"
    shutil.copytree(saved, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model, tokenizer = open_model("some/tiny")
    assert len(tokenizer) == 257
    expected = tiny_model(dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert len(hub.asked) == 1


def test_a_model_on_the_hub_is_left_to_transformers(hub):
    hub.answer = None
    assert "local_files_only" not in locating.located("some/tiny", None)
    assert locating.located("some/tiny", "v2")["revision"] == "v2"
    assert [url.split("/resolve/")[1] for url, _ in hub.asked] == ["main/config.json", "v2/config.json"]


def test_a_model_in_memory_is_no_name_and_needs_its_tokenizer(tmp_path):
    model = tiny_model()
    for call in (lambda: load(model), lambda: open_config(model)):
        with pytest.raises(ModelError, match="not a LlamaForCausalLM: save the model"):
            call()
    text = ["text"]
    calls = [
        lambda: compress(model, tmp_path / "out", keep=0.8, calibration=text),
        lambda: prune(model, tmp_path / "out", blocks=1, calibration=text),
        lambda: compare(model, tmp_path / "out", methods=["svd"], keeps=[0.8], text=text, calibration=text),
        lambda: evaluate(model, text=text),
        lambda: generate(model, "text"),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="needs its tokenizer: pass tokenizer=AutoTokenizer"):
            call()


def test_an_adapter_is_called_an_adapter(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}
    # in the second, transformers would load the adapter's base model in place of the one beside it
    for folder in (tmp_path / "adapter", base):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
        for open_ in (open_config, open_tokenizer, open_model):
            with pytest.raises(
                ModelError, match=r"is a LORA adapter of owner/base, not a model; merge .*merge_and_unload"
            ):
                open_(folder)
    (base / "adapter_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ModelError, match="is a PEFT adapter of an unnamed model"):
        open_config(base)


def test_a_snapshot_of_the_cache_is_called_by_its_hub_id(tmp_path):
    snapshot = tmp_path / "hub/models--owner--tiny--v1/snapshots/0123456789abcdef"
    save_tiny(snapshot)
    assert model_name(snapshot) == model_name(f"{snapshot}/") == "owner/tiny--v1"
    assert model_name(snapshot.parent) == "snapshots" and model_name("owner/other") == "owner/other"
