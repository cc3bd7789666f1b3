"""Layers of shared atoms against explicit sums in float64."""

import copy

import pytest
import torch

from cospadi.errors import ModelError
from cospadi.layers.shared_linear import SharedLinear, SharedSpec

MODULES = ("m.0.q", "m.1.q", "m.3.q")
KINDS = {"both": (2, (3, 0, 1)), "atoms": (2, (0, 0, 0)), "low rank": (0, (2, 5, 1)), "whole": (3, (0, 0, 0))}


def make(kind, bias=False, dtype=torch.float64, seed=0):
    """Linked layers with random factors, and the dense weights they stand for."""
    atoms, ranks = KINDS[kind]
    spec = SharedSpec(MODULES, 7, 5, atoms, ranks)
    layers = [SharedLinear(spec, index, bias=bias, dtype=dtype) for index in range(3)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    SharedLinear.link(layers)
    dense = []
    for layer in layers:
        factors = {name: p.detach().double() for name, p in layer.factors().items()}
        weight = factors.get("matrix", torch.zeros(5, 7, dtype=torch.float64)).clone()
        if "coefficients" in factors:
            weight += torch.einsum("s,soi->oi", factors["coefficients"], layers[0].atoms.detach().double())
        if "up" in factors:
            weight += factors["up"] @ factors["down"]
        dense.append(weight)
    return layers, dense


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_explicit_sum(kind, bias):
    layers, dense = make(kind, bias)
    x = torch.randn(2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer, weight in zip(layers, dense, strict=True):
        expected = x @ weight.T + (layer.bias if bias else 0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-12, atol=1e-12)
        assert layer.dense_weight(torch.float32).dtype == torch.float32


def test_atoms_lie_in_the_first_layer_alone():
    layers, _ = make("both")
    assert [set(layer.factors()) for layer in layers] == [
        {"atoms", "coefficients", "down", "up"},
        {"coefficients"},
        {"coefficients", "down", "up"},
    ]
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert not list(layers[1].children())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(kind):
    layers, _ = make(kind, dtype=torch.bfloat16)
    spec = layers[0].spec
    assert spec.bytes == sum(p.numel() * p.element_size() for layer in layers for p in layer.factors().values())
    assert spec.dense_bytes == 3 * 7 * 5 * 2
    assert SharedSpec.from_dict(spec.to_dict()) == spec
    assert spec.name == "m.0-3.q"


def test_composing_in_16_bits_agrees_within_rounding():
    layers, dense = make("both", dtype=torch.bfloat16)
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    for layer, weight in zip(layers, dense, strict=True):
        composed = torch.nn.functional.linear(x, layer.dense_weight())
        assert composed.dtype == layer(x).dtype == torch.bfloat16
        scale = float((x.double() @ weight.T).square().mean().sqrt())
        assert float((composed - layer(x)).double().abs().max()) < 0.05 * scale


def test_changed_atoms_take_effect_at_once_and_in_copies():
    layers, _ = make("atoms")
    x = torch.ones(1, 7, dtype=torch.float64)
    before = layers[2](x)
    duplicate = copy.deepcopy(torch.nn.ModuleList(layers))
    with torch.no_grad():
        layers[0].atoms.mul_(2)
    torch.testing.assert_close(layers[2](x), 2 * before)
    torch.testing.assert_close(duplicate[2](x), before)


def test_gradients_reach_the_atoms_from_every_layer():
    layers, _ = make("both")
    layers[0].atoms.requires_grad_(True)
    sum(layer(torch.ones(1, 7, dtype=torch.float64)).sum() for layer in layers).backward()
    total = sum(layer.coefficients for layer in layers)
    torch.testing.assert_close(layers[0].atoms.grad, total[:, None, None].expand(2, 5, 7))


def test_misuse_is_named():
    spec = SharedSpec(MODULES, 7, 5, 1, (0, 0, 0))
    layers = [SharedLinear(spec, index) for index in range(3)]
    with pytest.raises(ModelError, match=r"m\.1\.q: the layer is not joined"):
        layers[1](torch.ones(1, 7))
    with pytest.raises(ValueError, match="not its 3 modules in order"):
        SharedLinear.link(layers[::-1])
    with pytest.raises(ModelError, match="holds no data yet"):
        SharedLinear(spec, 0, device="meta")(torch.ones(1, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atoms": 4}, "4 atoms for 3 modules"),
        ({"atoms": -1}, "-1 atoms"),
        ({"ranks": (1, 1)}, "3 modules but 2 ranks"),
        ({"ranks": (0, 6, 0)}, r"m\.1\.q: a rank of 6"),
        ({"atoms": 3, "ranks": (0, 0, 1)}, "keeps its matrix"),
        ({"d_in": 0}, "5x0"),
    ],
)
def test_impossible_specs(change, message):
    fields = {"modules": MODULES, "d_in": 7, "d_out": 5, "atoms": 1, "ranks": (0, 0, 0)} | change
    with pytest.raises(ValueError, match=message):
        SharedSpec(**fields)


@pytest.mark.parametrize("change", [{"atoms": 1.0}, {"ranks": [True, 0, 0]}, {"modules": [1, 2, 3]}, {"d_in": None}])
def test_descriptions_of_wrong_types(change):
    data = SharedSpec(MODULES, 7, 5, 1, (0, 0, 0)).to_dict() | change
    with pytest.raises(ValueError, match="whole numbers"):
        SharedSpec.from_dict(data)
    with pytest.raises(ValueError, match="not the description"):
        SharedSpec.from_dict({"modules": ["a"]})
