"""A compressed checkpoint through transformers, in this process."""

import json

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import cospadi.integrations.transformers as integration
from checkpoints.factory import KINDS, compress_randomly
from cospadi.checkpoint import export_dense, load, read_config, save
from cospadi.errors import CheckpointError, ModelError
from cospadi.layers import FactoredLinear
from tiny import byte_tokenizer, save_tiny, tiny_model

ids = torch.arange(30).reshape(2, 15)
DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def logits(model):
    with torch.no_grad():
        return model(ids).logits


def make(directory, architecture="llama", dtype=torch.bfloat16, shards="5GB", **overrides):
    """A compressed checkpoint and the logits of the model that was saved."""
    source = save_tiny(directory / "dense", architecture, dtype=dtype, **overrides)
    model = AutoModelForCausalLM.from_pretrained(source)
    groups = compress_randomly(model)
    save(model, byte_tokenizer(), directory / "c", groups, max_shard_size=shards)
    return directory / "c", logits(model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("c"), "qwen2", shards="20KB")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_save_load_save(tmp_path, architecture, dtype, tied):
    directory, before = make(tmp_path, architecture, dtype, "10KB", tie_word_embeddings=tied)
    model = load(directory)
    assert model.dtype == dtype and not model.training
    assert torch.equal(logits(model), before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    save(model, AutoTokenizer.from_pretrained(directory), tmp_path / "again", read_config(directory), "10KB")
    files = sorted(p.name for p in directory.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir()) and len(files) > 6
    for name in files:
        if name.startswith("tokenizer"):  # transformers adds to them what the model's own tokenizer class would do
            continue
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    if tied:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert "lm_head.weight" not in index["weight_map"]


def test_every_layer_is_factored_and_frozen(checkpoint):
    model = load(checkpoint[0])
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    assert len(layers) == 21
    assert {layer.group.method for layer in layers} == set(KINDS)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(
        name.rsplit(".", 1)[0] in {layer.name for layer in layers} for name in trainable if "bias" not in name
    )
    assert "model.norm.weight" in trainable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_can_be_chosen(checkpoint, dtype):
    directory, before = checkpoint
    model = load(directory, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.values.dtype == dtype and layer.mask.dtype == torch.int32
    torch.testing.assert_close(logits(model).float(), before.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("device_map", ["cpu", "auto", DISK, {"": "disk"}])
def test_device_maps(checkpoint, device_map, tmp_path):
    directory, before = checkpoint
    model = load(directory, device_map=device_map, offload_folder=str(tmp_path))
    got = logits(model)
    if torch.cuda.is_available() and device_map == "auto":
        torch.testing.assert_close(got.cpu().float(), before.float(), rtol=0.05, atol=0.05)
    else:
        assert torch.equal(got, before)


def test_single_sibling_of_an_offloaded_group(checkpoint, tmp_path):
    whole = load(checkpoint[0]).model.layers[0].self_attn
    offloaded = load(checkpoint[0], device_map=DISK, offload_folder=str(tmp_path)).model.layers[0].self_attn
    assert offloaded.q_proj.dictionary.is_meta
    x = torch.randn(3, 24, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for leaf in ("v_proj", "k_proj", "v_proj", "q_proj"):
        assert torch.equal(getattr(offloaded, leaf)(x), getattr(whole, leaf)(x))
    assert offloaded.q_proj.dictionary.is_meta


def test_disk_offload_with_tied_embeddings(tmp_path):
    directory, before = make(tmp_path, tie_word_embeddings=True)
    model = load(directory, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    assert torch.equal(logits(model), before)


def test_offloaded_model_can_be_saved(checkpoint, tmp_path):
    model = load(checkpoint[0], device_map=DISK, offload_folder=str(tmp_path / "off"))
    save(model, None, tmp_path / "again", read_config(checkpoint[0]))
    assert torch.equal(logits(load(tmp_path / "again")), checkpoint[1])


def test_native_loading_equals_ours(checkpoint):
    directory, before = checkpoint
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(model), before)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable and model.hf_quantizer.is_compileable


def test_plain_save_pretrained_is_enough(checkpoint, tmp_path):
    directory, before = checkpoint
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path, max_shard_size="30KB")
    assert torch.equal(logits(load(tmp_path)), before)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described == json.loads((directory / "config.json").read_text())["quantization_config"]
    # in float32 the factors are stored in float32, larger but whole
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    assert torch.equal(logits(load(tmp_path / "wide", dtype=torch.bfloat16)), before)


def test_generate(checkpoint):
    directory, _ = checkpoint
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("a small model", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids = prompt["input_ids"]
    for _ in range(6):  # without a cache
        with torch.no_grad():
            scores = model(ids).logits[:, -1].float()
        scores[:, 256] = float("-inf")
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, ids)


def test_compiled_model_equals_eager(checkpoint):
    model = load(checkpoint[0], dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits(model))


def test_factors_can_be_trained(checkpoint):
    model = load(checkpoint[0], dtype=torch.float32)
    for p in model.parameters():
        p.requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, FactoredLinear) and m.group.method == "free16"]
    factors = [p for m in layers for p in m.parameters() if p.is_floating_point()]
    for p in factors:
        p.requires_grad_(True)
    optimiser = torch.optim.SGD(factors, lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        p.grad is not None and bool(p.grad.any()) for m in layers for n, p in m.named_parameters() if n == "values"
    )


def test_dequantize(checkpoint, tmp_path):
    model = load(checkpoint[0], dtype=torch.float32)
    before = logits(model)
    dense = model.dequantize()
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    assert dense.to(torch.float64).dtype == torch.float64  # no longer refused
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_dequantize_refuses_offloaded_layers(checkpoint, tmp_path):
    model = load(checkpoint[0], device_map=DISK, offload_folder=str(tmp_path))
    with pytest.raises(ModelError, match="without offloading"):
        model.dequantize()
    remove_hook_from_module(model, recurse=True)


def test_a_dense_model_is_not_compressed_on_the_fly(tmp_path, checkpoint):
    config = integration.FormatConfig(**json.loads((checkpoint[0] / "config.json").read_text())["quantization_config"])
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path), quantization_config=config)


def test_register_twice():
    integration.register()
    known = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    integration.register()
    assert (dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)) == known
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["cospadi"] is integration.FormatConfig


def test_stock_checkpoints_load_too(tmp_path):
    path = save_tiny(tmp_path)
    assert torch.equal(logits(load(path)), logits(AutoModelForCausalLM.from_pretrained(path)))
    (path / sorted(p.name for p in path.glob("*.safetensors"))[0]).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load(path)


def test_compressed_head_of_a_tied_model(tmp_path):
    from checkpoints.factory import install, make_spec, random_factors

    model = tiny_model("llama", tie_word_embeddings=True)
    spec = make_spec("free16", ["lm_head"], 24, (257,))
    install(model, spec, random_factors(spec))
    save(model, None, tmp_path, [spec])
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert isinstance(load(tmp_path).lm_head, FactoredLinear)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_export_gives_the_same_logits(tmp_path, dtype):
    directory, before = make(tmp_path, dtype=torch.float32)
    export_dense(directory, tmp_path / "dense", dtype)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.float32 and not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bare_decoder(tmp_path, architecture):
    """`AutoModel` builds the decoder without its head; module names then lack the prefix."""
    directory, _ = make(tmp_path, architecture, torch.float32)
    whole, bare = load(directory), AutoModel.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    assert sum(isinstance(module, FactoredLinear) for module in bare.modules()) == 21
    bare.save_pretrained(tmp_path / "bare")
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "bare")
        assert torch.equal(again(ids).last_hidden_state, bare(ids).last_hidden_state)
