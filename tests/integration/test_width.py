"""Width-pruned models through transformers: native loading where needed, stock checkpoints where possible."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import cospadi.integrations.transformers  # noqa: F401 - registers the formats
from cospadi.checkpoint import is_compressed, load
from cospadi.engine.prune import prune as engine_prune
from cospadi.errors import CheckpointError, ModelError
from cospadi.evaluation import evaluate
from cospadi.evaluation import load as load_any
from cospadi.layers.sliced import SlicedBlock
from cospadi.model_view import discover, open_model
from cospadi.pruning import Evidence, Tokens, block_bytes, get_pruning_method
from cospadi.pruning.width.residual import residual_blocks
from cospadi.pruning.width.slicegpt import find_bases
from cospadi.recipe import Recipe
from tiny import byte_tokenizer, save_tiny, tiny_model, tiny_text, token_ids

ids = token_ids(2, 15, seed=3)
MAKE = {
    "slicegpt": ("slicegpt", 0.9, {}),
    "llm_pruner": ("llm_pruner", 0.8, {"leave_first": 1, "leave_last": 1}),
    "llm_pruner everywhere": ("llm_pruner", 0.5, {"leave_first": 0, "leave_last": 0}),
}
NATIVE = ["slicegpt", "llm_pruner"]


def logits(model):
    with torch.no_grad():
        return model(ids).logits


def prune(kind, architecture="llama", **overrides):
    method, keep, options = MAKE[kind]
    model = tiny_model(architecture, **overrides)
    edit = get_pruning_method(method).shrink(Evidence(discover(model), Tokens(token_ids(4, 20))), keep, options)
    return edit.apply(discover(model))


@pytest.fixture(scope="module", params=NATIVE)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("w") / "w"
    model = prune(request.param, "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)
    model.save_pretrained(directory, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(directory)
    return directory, logits(model)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_prune_save_load(tmp_path, architecture, kind):
    model = prune(kind, architecture)
    before = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (kind in NATIVE)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(load(tmp_path)), before)
    prompt = {"input_ids": ids[:, :6], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    wanted = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(**prompt, **wanted), loaded.generate(**prompt, **wanted, use_cache=False))
    static = loaded.generate(**prompt, **wanted, cache_implementation="static")
    assert torch.equal(static, loaded.generate(**prompt, **wanted))


def tensors_in(directory):
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def test_save_again_gives_the_same_tensors(checkpoint, tmp_path):
    directory, before = checkpoint
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(logits(load(tmp_path)), before)
    assert (directory / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    first, second = tensors_in(directory), tensors_in(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) and t.dtype == second[name].dtype for name, t in first.items())


def test_the_package_loads_it_by_every_door(checkpoint):
    directory, before = checkpoint
    model, tokenizer = load_any(directory, dtype=torch.bfloat16)
    assert torch.equal(logits(model), before) and tokenizer("ab").input_ids == [97, 98]
    model, _ = open_model(directory)
    assert torch.equal(logits(model), before) and is_compressed(model.config)
    wide = load(directory, dtype=torch.float32)
    torch.testing.assert_close(logits(wide), before.float(), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "disk"}])
def test_device_maps(checkpoint, device_map, tmp_path):
    directory, before = checkpoint
    model = load(directory, device_map=device_map, offload_folder=str(tmp_path))
    assert model.device.type == "cuda" or torch.equal(logits(model), before)


def test_bare_decoder(checkpoint, tmp_path):
    directory, _ = checkpoint
    whole, bare = load(directory), AutoModel.from_pretrained(directory)
    with torch.no_grad():
        expected = whole.model(ids).last_hidden_state
        assert torch.equal(bare(ids).last_hidden_state, expected)
        bare.save_pretrained(tmp_path)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, expected)


def test_sliced_blocks_are_still_decoder_layers(tmp_path):
    prune("slicegpt").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    states = model(ids, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [16, 16, 16, 24]
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert isinstance(again.model.layers[0], SlicedBlock)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_with_gradient_checkpointing(tmp_path):
    prune("slicegpt").save_pretrained(tmp_path)
    model = load(tmp_path).train()
    plain = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert "model.layers.0.mixer_shortcut.weight" in grads
        if not checkpointing:
            plain = grads
    assert plain.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain[name])


def test_compiled_model_equals_eager(tmp_path):
    prune("slicegpt").save_pretrained(tmp_path)
    model = load(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits(model))


STOCK = """
import json, sys
sys.modules["cospadi"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        print(json.dumps("loaded " + type(AutoModelForCausalLM.from_pretrained(directory)).__name__))
    except Exception as error:
        print(json.dumps(str(error)))
"""
AUTOMATIC = """
import sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    print(float(model(torch.arange(12)[None]).logits.float().sum()))
"""


def run(code, *arguments, **environment):
    """A fresh interpreter, outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=str(Path(sys.prefix)),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
    )


def slice_nothing():
    """Every matrix has its stock shape."""
    model = tiny_model()
    view = discover(model)
    return find_bases(Evidence(view, Tokens(token_ids(4, 20))), residual_blocks(view), 24).apply(view)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    directory = tmp_path_factory.mktemp("several")
    for kind in MAKE:
        prune(kind).save_pretrained(directory / kind)
    slice_nothing().save_pretrained(directory / "nothing")
    return [directory / kind for kind in (*MAKE, "nothing")]


def test_without_the_package_only_stock_shapes_load(several):
    done = run(STOCK, *several, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    sliced, pruned, equal, nothing = map(json.loads, done.stdout.splitlines())
    assert equal == "loaded LlamaForCausalLM"
    for message in (sliced, pruned, nothing):
        assert "mismatch" in message
    assert done.stderr.count("Unknown quantization type, got cospadi_width") >= 1
    # where nothing was sliced only the guard is in the way
    assert "input_layernorm.weight" in done.stderr + nothing
    torch.testing.assert_close(logits(load(several[-1])), logits(tiny_model()), rtol=1e-4, atol=1e-4)


def test_with_the_package_no_import_is_needed(several):
    done = run(AUTOMATIC, *several)
    assert done.returncode == 0, done.stderr
    for directory, line in zip(several, done.stdout.split(), strict=True):
        with torch.no_grad():
            expected = float(load(directory)(torch.arange(12)[None]).logits.sum())
        assert float(line) == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_damage_is_named_by_both_ways_of_loading(checkpoint, tmp_path):
    load(checkpoint[0]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model\.layers\.1\.self_attn\.q_proj"):
            loader(tmp_path)
    save_file(tensors | {"model.layers.1.more": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.1\.more"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["linears"][name.removesuffix(".weight")]["outputs"] = -3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config is wrong"):
        load(tmp_path)


def test_a_dense_model_is_not_pruned_on_the_fly(checkpoint, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(checkpoint[0]).config.quantization_config
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path), quantization_config=config)


def test_a_pruned_model_is_not_sliced_again(tmp_path):
    model = prune("slicegpt")
    with pytest.raises(ModelError, match="choose another pruning method"):
        get_pruning_method("slicegpt").shrink(Evidence(discover(model), Tokens(ids)), 0.9, {})


@pytest.mark.parametrize("kind", MAKE)
def test_from_text_to_checkpoint(tmp_path, kind):
    """The command's own way: bytes told are the bytes there, and whatever comes out is evaluated."""
    method, keep, options = MAKE[kind]
    source = save_tiny(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_text(6000))
    out = tmp_path / "out"
    calibration = {"samples": 4, "seq_len": 32}
    result = engine_prune(
        source,
        out,
        method=method,
        keep_blocks=keep,
        options=options,
        device="cpu",
        recipe=Recipe.model_validate({"calibration": calibration | {"source": str(tmp_path / "text.txt")}}),
    )
    model, _ = load_any(out)
    assert result.report["bytes_after"] == sum(map(block_bytes, model.model.layers))
    assert result.report["bytes_after"] <= keep * result.report["bytes_before"]
    assert evaluate(out, text=str(tmp_path / "text.txt"), seq_len=64, device="cpu")["perplexity"] > 1


def test_tokenizer_lies_beside(checkpoint):
    assert AutoTokenizer.from_pretrained(checkpoint[0]).eos_token_id == 256
