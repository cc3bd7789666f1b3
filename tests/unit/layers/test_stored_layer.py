"""Packed integers are parameters that can never be trained, whatever is done to the layer that holds them."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints.factory import make_spec
from cospadi.format import GroupSpec
from cospadi.format.leaves import codes_name, dictionary_name
from cospadi.kernels.synthetic import random_packed
from cospadi.layers import FactoredLinear, IntegerParameter
from cospadi.layers.linear_block import LinearBlock
from cospadi.layers.sliced import SlicedNorm

D_IN = 24


def make_layer(kind: str = "word4", seed: int = 0) -> FactoredLinear:
    spec: GroupSpec = make_spec(kind, ["m0"], D_IN, (13,))
    layer = FactoredLinear(spec, 0, True, dtype=torch.float32)
    for role, tensor in random_packed(spec.codes, torch.float32, seed=seed).items():
        setattr(layer, codes_name(role), nn.Parameter(tensor, False))
    if spec.dictionary is not None:
        for role, tensor in random_packed(spec.dictionary, torch.float32, seed=seed + 1).items():
            setattr(layer, dictionary_name(role), nn.Parameter(tensor, False))
    nn.init.normal_(layer.bias)
    return layer


def check(layer: nn.Module) -> None:
    """Integers stay frozen, everything else obeys."""
    integers = [p for p in layer.parameters() if not p.is_floating_point()]
    floats = [p for p in layer.parameters() if p.is_floating_point()]
    assert integers and all(isinstance(p, nn.Parameter) for p in integers)
    for wanted in (True, False):
        assert layer.requires_grad_(wanted) is layer
        assert all(p.requires_grad is wanted for p in floats)
        assert not any(p.requires_grad for p in integers)


@pytest.mark.parametrize("kind", ["word4", "free14", "pruned8", "zeros3"])
def test_a_whole_layer_may_be_asked_for_gradients(kind):
    layer = make_layer(kind)
    check(layer)
    layer.requires_grad_(True)
    layer(torch.randn(3, D_IN)).square().sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in layer.named_parameters() if p.is_floating_point()}


def by_attribute(layer, tmp_path):
    layer.values = nn.Parameter(layer.values.data.clone(), False)
    return layer


def by_loading(layer, tmp_path):
    layer.load_state_dict(make_layer(seed=1).state_dict())
    return layer


def by_assigning(layer, tmp_path):
    layer.load_state_dict(make_layer(seed=1).state_dict(), assign=True)
    return layer


def by_file(layer, tmp_path):
    save_file(layer.state_dict(), tmp_path / "x.safetensors")
    layer.load_state_dict(load_file(tmp_path / "x.safetensors"), assign=True)
    return layer


def by_meta(layer, tmp_path):
    state = layer.state_dict()
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer


def by_copy(layer, tmp_path):
    return copy.deepcopy(layer)


def by_pickle(layer, tmp_path):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_hooks(layer, tmp_path):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    whole = nn.Sequential(layer)
    cpu_offload(whole, torch.device("cpu"))
    whole(torch.randn(2, D_IN))
    assert layer.values.is_meta
    check(layer)
    remove_hook_from_module(whole, recurse=True)
    return layer


def by_disk(layer, tmp_path):
    from accelerate import disk_offload
    from accelerate.hooks import remove_hook_from_module

    whole = nn.Sequential(layer)
    disk_offload(whole, tmp_path, torch.device("cpu"))
    whole(torch.randn(2, D_IN))
    assert layer.values.is_meta
    remove_hook_from_module(whole, recurse=True)
    return layer


WAYS = [by_attribute, by_loading, by_assigning, by_file, by_meta, by_copy, by_pickle, by_hooks, by_disk]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_integers_stay_frozen(way, tmp_path):
    layer, x = make_layer(), torch.randn(3, D_IN)
    loaded = way in (by_loading, by_assigning)
    wanted = (make_layer(seed=1) if loaded else layer).dense_weight()
    layer = way(layer, tmp_path)
    check(layer)
    assert torch.equal(layer.dense_weight(), wanted)
    torch.testing.assert_close(layer(x), x @ wanted.T + layer.bias)


def test_readers_of_tensors_see_plain_ones():
    layer = make_layer()
    assert all(type(tensor) is torch.Tensor for tensor in layer.state_dict().values())
    file = io.BytesIO()
    torch.save(dict(layer.named_parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)  # needs no class of the package
    assert torch.equal(loaded["values"], layer.values)


def test_a_parameter_of_a_parameter_and_its_notes():
    layer = make_layer()
    again = IntegerParameter(layer.values)
    assert again.data_ptr() == layer.values.data_ptr() and torch.equal(again, layer.values)
    noted = nn.Parameter(layer.values.data, False)
    noted._is_hf_initialized = True  # as transformers does
    layer.values = noted
    assert layer.values._is_hf_initialized


def test_compiles_whole_with_gradients_asked_for():
    torch._dynamo.reset()
    layer = make_layer().requires_grad_(True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.dictionary_scales.grad is not None and layer.values.grad is None


def test_guards_are_frozen_too():
    layer = make_layer()
    layer.add_guard()
    check(layer)
    layer.drop_guard()
    assert "weight" not in dict(layer.named_parameters())
    norm = SlicedNorm(8, 12, 1e-6)
    norm.add_guard("cpu")
    check(norm)
    check(LinearBlock(8, "mlp.up_proj.weight"))


def test_optimizers_take_all_parameters():
    layer = make_layer().requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(torch.randn(3, D_IN)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in layer.named_parameters() if p.is_floating_point()}
