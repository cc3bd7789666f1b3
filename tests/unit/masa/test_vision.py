"""The vision transformer with shared attention."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from cospadi.errors import CheckpointError, RecipeError
from cospadi.masa import MasaViTConfig, MasaViTForImageClassification, attention_parameters, removed_share

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 10,
    "initializer_range": 0.2,
}


def model(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    built = MasaViTForImageClassification(MasaViTConfig(**(SIZES | fields))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return built


def images(count=3, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shared_types": ["q", "k", "v"]},
        {"attention_sharing": "sequential"},
        {"attention_sharing": "low_rank"},
        {"attention_sharing": "dense"},
        {"qkv_bias": False},
    ],
    ids=str,
)
def test_equals_a_dense_classifier_of_the_same_weights(fields):
    built = model(torch.float64, **fields)
    stock = ViTForImageClassification(ViTConfig(**(SIZES | {"qkv_bias": fields.get("qkv_bias", True)}))).double().eval()
    weights = {name: tensor for name, tensor in built.state_dict().items() if name in stock.state_dict()}
    for index, layer in enumerate(built.vit.layers):
        for name in "qkvo":
            projection = getattr(layer.attention, f"{name}_proj")
            weights[f"vit.layers.{index}.attention.{name}_proj.weight"] = projection.weight.detach()
    stock.load_state_dict(weights)
    with torch.no_grad():
        wanted = stock(images().double()).logits
        torch.testing.assert_close(built(images().double()).logits, wanted)
        built.fold()
        built.compose()
        torch.testing.assert_close(built(images().double()).logits, wanted)
    assert wanted.std() > 0.01


@pytest.mark.parametrize("design", ["masa", "sequential", "repeat", "low_rank", "dense"])
def test_parameter_count_is_exact(design):
    built = model(attention_sharing=design)
    built.fold()
    numel = sum(
        parameter.numel()
        for name, parameter in built.named_parameters()
        if ("shared_attention" in name or ".attention." in name) and not name.endswith("_proj.bias")
    )
    assert numel == attention_parameters(built.config)
    if design == "masa":
        assert removed_share(built.config) == pytest.approx(1 - 2 * (24 * 24 + 6) / (6 * 24 * 24))


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    built = model()
    logits = built(images()).logits
    built.fold()
    built.save_pretrained(tmp_path)
    assert not any("network" in name for name in load_file(tmp_path / "model.safetensors"))
    for options in ({}, {"compose_weights": True}):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **options)
        assert type(loaded) is MasaViTForImageClassification and torch.equal(loaded(images()).logits, logits)


def test_a_checkpoint_whose_parts_disagree(tmp_path):
    built = model()
    built.fold()
    built.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vit.shared_attention.v.coefficients"] = torch.zeros(5, 2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: tensor vit.shared_attention.v.coefficients is \[5, 2\]"
    ):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("design", ["masa", "repeat", "low_rank", "dense"])
def test_starts_with_the_weights_of_a_dense_layer(design):
    torch.manual_seed(3)
    fields = SIZES | {"hidden_size": 96, "initializer_range": 0.02, "attention_sharing": design}
    for layer in MasaViTForImageClassification(MasaViTConfig(**fields)).vit.layers:
        for name in "qkvo":
            assert getattr(layer.attention, f"{name}_proj").weight.std().item() == pytest.approx(0.02, rel=0.06), name


def test_biases_start_at_zero_and_learn():
    torch.manual_seed(0)
    built = MasaViTForImageClassification(MasaViTConfig(**SIZES)).train()
    bias = built.vit.layers[2].attention.q_proj.bias
    assert torch.equal(bias, torch.zeros(24))
    built(images(), labels=torch.tensor([1, 2, 3])).loss.backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    assert bias.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_atoms": 7}, "num_atoms 7 is not possible for 6"), ({"attention_sharing": "gqa"}, "not possible")],
)
def test_wrong_configurations(fields, message):
    with pytest.raises(RecipeError, match=message):
        MasaViTConfig(**(SIZES | fields))
