import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from checkpoints.factory import KINDS, compress_randomly, dense_rows, install, make_spec, random_factors, tiny_groups
from cospadi.checkpoint import storage_dtype
from cospadi.checkpoint.formats.factored import FACTORED
from cospadi.errors import ModelError
from cospadi.format import Factors, Stored
from cospadi.layers import FactoredLinear
from cospadi.layers.tensors import GUARD
from tiny import tiny_config, tiny_model

Q = "model.layers.0.self_attn.q_proj"
ids = torch.arange(20).reshape(2, 10)


def dense_twin(model, groups, factors):
    """The same model, with the product of the factors written into its linear layers by hand."""
    dtype = storage_dtype(model)
    for spec, found in zip(groups, factors, strict=True):
        weight = dense_rows(spec, found, dtype)
        for name, rows in zip(spec.modules, weight.split(list(spec.d_out)), strict=True):
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(rows)
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_installed_model_computes_what_its_dense_twin_does(architecture):
    model, twin = tiny_model(architecture), tiny_model(architecture)
    groups = tiny_groups(model)
    factors = [random_factors(spec, seed) for seed, spec in enumerate(groups)]
    for spec, found in zip(groups, factors, strict=True):
        install(model, spec, found)
    dense_twin(twin, groups, factors)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)


def test_biases_and_modes_are_kept():
    model = tiny_model("qwen2")
    bias = model.get_submodule(Q).bias
    compress_randomly(model)
    layer = model.get_submodule(Q)
    assert isinstance(layer, FactoredLinear) and layer.bias is bias and not layer.training
    assert model.get_submodule("model.layers.0.mlp.up_proj").bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_are_rounded_to_the_models_sixteen_bit_float(dtype):
    model = tiny_model("llama", dtype=dtype)
    spec = make_spec("low_rank", [Q], 24, (24,))
    factors = random_factors(spec)
    install(model, spec, factors)
    layer = model.get_submodule(Q)
    sixteen = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert layer.values.dtype == dtype and not layer.values.requires_grad
    assert torch.equal(layer.values, factors.codes.matrix.to(sixteen).to(dtype))


def test_the_guard_is_in_one_place():
    model = tiny_model("llama")
    groups = tiny_groups(model)
    FACTORED.replace(model, groups)
    assert [layer.name for _, layer in FACTORED.layers(model) if GUARD in layer.state_dict()] == [Q]
    FACTORED.replace(model, groups[2:])
    assert [layer.name for _, layer in FACTORED.layers(model) if GUARD in layer.state_dict()] == [groups[2].modules[0]]


def test_replacing_twice_changes_nothing():
    model = tiny_model("llama")
    groups = compress_randomly(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    FACTORED.replace(model, groups)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_on_meta():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    groups = tiny_groups(model)
    FACTORED.replace(model, groups, torch.bfloat16)
    assert {p.device.type for _, layer in FACTORED.layers(model) for p in layer.parameters()} == {"meta"}
    install(model, groups[0], random_factors(groups[0]))
    assert model.get_submodule(Q).values.device.type == "cpu"


def test_what_cannot_be_compressed_is_named():
    model = tiny_model("llama")
    cases = [
        (["model.layers.0.self_attn.z_proj"], 24, "no such module"),
        (["model.layers.0.input_layernorm"], 24, "LlamaRMSNorm cannot be compressed"),
        ([Q], 23, r"\(24, 24\), its group says \(24, 23\)"),
    ]
    for modules, d_in, message in cases:
        with pytest.raises(ModelError, match=message) as caught:
            FACTORED.replace(model, [make_spec("free16", modules, d_in, (24,))])
        assert modules[0] in str(caught.value)
    assert not FACTORED.layers(model)
    # compressed already, but in another way
    compress_randomly(model)
    with pytest.raises(ModelError, match="FactoredLinear cannot be compressed"):
        FACTORED.replace(model, [make_spec("low_rank", [Q], 24, (24,), atoms=3)])


def test_factors_that_do_not_fit_are_refused():
    model = tiny_model("llama")
    spec = make_spec("free16", [Q], 24, (24,))
    factors = random_factors(spec)
    with pytest.raises(ValueError, match="dictionary is missing"):
        install(model, spec, Factors(factors.codes))
    with pytest.raises(ValueError, match="spec says"):
        install(model, spec, Factors(factors.codes, Stored(torch.ones(3, 3))))
    packed = factors.pack(spec, torch.bfloat16)
    for wrong in (
        {"codes.values": packed["codes.values"][:, :-1]},
        {"codes.values": packed["codes.values"][:-1]},
        {"codes.zeros": packed["codes.mask"]},
        {"0.values": packed["codes.values"]},
    ):
        with pytest.raises(ValueError, match="does not fit"):
            FACTORED.install(model, spec, packed | wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_again(kind):
    model = tiny_model("qwen2")
    compress_randomly(model, [kind])
    with torch.no_grad():
        before = model(ids).logits
        FACTORED.dense(model)
        assert not FACTORED.layers(model)
        layer = model.get_submodule(Q)
        assert type(layer) is nn.Linear and layer.bias is not None and not layer.training
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_compressed_head_is_untied():
    model = tiny_model("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    spec = make_spec("free16", ["lm_head"], 24, (257,))
    install(model, spec, random_factors(spec))
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert isinstance(model.lm_head, FactoredLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
