import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import initialization

from checkpoints.factory import compress_randomly, make_spec, random_factors
from cospadi.checkpoint import attach
from cospadi.checkpoint.formats.factored import FACTORED
from cospadi.checkpoint.formats.shared import SHARED
from cospadi.errors import ModelError
from cospadi.format import SharedSpec
from cospadi.layers import ComputedLinear
from tiny import tiny_model

ids = torch.arange(20).reshape(2, 10)


def factored(kinds=("free16", "rounded4", "balanced8", "low_rank")):
    model = tiny_model("qwen2")
    attach(model, compress_randomly(model, kinds))
    return model


def shared():
    model = tiny_model("llama")
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    spec = SharedSpec(tuple(names), 24, 24, 1, (2, 0, 3))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{index}.{leaf}": torch.randn(shape, generator=generator) / 5
        for index in range(3)
        for leaf, (shape, _) in spec.tensors(index).items()
    }
    SHARED.install(model, spec, tensors)
    attach(model, [spec])
    return model


MODELS = {"factored": factored, "shared": shared}


def layers(model):
    return [module for module in model.modules() if isinstance(module, ComputedLinear)]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weight_is_the_dense_weight_and_is_stored_nowhere(make):
    model = make()
    found = layers(model)
    assert found
    for layer in found:
        assert isinstance(layer, nn.Linear) and layer.weight.shape == (layer.out_features, layer.in_features)
        assert torch.equal(layer.weight.clone(), layer.dense_weight())
        assert "weight" not in dict(layer.named_parameters()) and layer.weight.dtype == torch.float32
    guards = [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8]
    assert guards == [f"{found[0].name}.weight"]


CHANGES = {
    "assigned": lambda layer: setattr(layer, "weight", torch.zeros(layer.out_features, layer.in_features)),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(layer.weight.shape))),
    "registered": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(layer.weight.shape))),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(layer.weight.shape)),
    "added": lambda layer: layer.weight.data.add_(1),
    "augmented": lambda layer: layer.weight.__iadd__(1),
    "items": lambda layer: layer.weight.__setitem__(0, 1),
    "view": lambda layer: layer.weight.data.view(-1).zero_(),
    "transposed": lambda layer: layer.weight.T[1:3].mul_(2),
    "scattered": lambda layer: layer.weight.reshape(-1).scatter_add_(0, torch.tensor([1]), torch.ones(1)),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "initialised": lambda layer: nn.init.normal_(layer.weight),
    "reset": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_changing_the_weight_is_refused(make, change):
    model = make()
    layer = layers(model)[1]
    before = layer.dense_weight()
    with pytest.raises(ModelError, match=f"{layer.name}: the weight of a compressed layer .*cospadi export"):
        change(layer)
    assert torch.equal(layer.dense_weight(), before)


def test_weight_may_be_set_to_itself():
    layer = layers(factored())[0]
    before = layer.dense_weight()
    layer.weight = layer.weight
    assert torch.equal(layer.dense_weight(), before)


def test_initialisers_of_transformers_leave_it_alone():
    model = factored()
    before = model(ids).logits
    for layer in layers(model):
        initialization.kaiming_uniform_(layer.weight)
        initialization.zeros_(layer.weight)
    assert torch.equal(model(ids).logits, before)


def test_functions_use_it_like_any_weight():
    layer = layers(factored())[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(3, -1))
    dense = layer.dense_weight()
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.linalg.svdvals(dense))
    assert layer.weight.tolist() == dense.tolist() and (layer.weight.numpy() == dense.numpy()).all()
    assert "ComputedWeight" in repr(layer.weight)


def test_it_follows_the_stored_tensors():
    layer = layers(factored(("low_rank",)))[0]
    weight = layer.weight
    with torch.no_grad():
        layer.values.mul_(2)
    assert torch.equal(weight.clone(), layer.dense_weight())


def test_copies_and_pickles():
    model = factored()
    layer = layers(model)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(layers(twin)[0].weight.clone(), layer.dense_weight())
        assert twin.state_dict().keys() == model.state_dict().keys()
    for made in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert type(made) is torch.Tensor and torch.equal(made, layer.dense_weight())


def test_state_dicts_are_loaded_with_the_guard():
    model, other = factored(), factored()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    state = model.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    name = f"{layers(model)[0].name}.weight"
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {name: torch.zeros(24, 24)})


class Fused(nn.Module):
    """Hands the weight to a function instead of calling the layer, as state-space layers do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight)


@pytest.mark.parametrize("kind", ["free16", "rounded4"])
def test_compiled_and_exported_programs_use_it(kind):
    model = tiny_model("llama")
    spec = make_spec(kind, ["model.layers.0.self_attn.o_proj"], 24, (24,))
    FACTORED.install(model, spec, random_factors(spec).pack(spec, torch.bfloat16))
    fused = Fused(model.model.layers[0].self_attn.o_proj)
    x = torch.randn(5, 24)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="eager")(x), fused(x))
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), fused(x))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outputs_may_be_changed_in_place(make):
    layer = layers(make())[-1]
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    y = layer(x)
    y += 1  # raises if autograd takes the output for a view
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(2, 5, -1), rtol=1e-4, atol=1e-5)


def test_a_compressed_layer_is_not_compressed_again():
    model = factored()
    spec = make_spec("pruned", ["model.layers.0.self_attn.o_proj"], 24, (24,))
    with pytest.raises(ModelError, match="FactoredLinear cannot be compressed"):
        FACTORED.replace(model, [spec])
