"""Private hooks of PyTorch: with the public fallback of each, everything still computes the same."""

import pytest
import torch
from torch import nn

from checkpoints.factory import make_spec
from cospadi.format.leaves import codes_name, dictionary_name
from cospadi.kernels import _torch_private as hooks
from cospadi.kernels import factored_linear, reference
from cospadi.kernels.synthetic import random_packed
from cospadi.layers import FactoredLinear

D_IN, D_OUT = 24, (13, 7, 9)


@pytest.fixture(params=[*hooks.FALLBACKS, "all"])
def without_hook(request, monkeypatch):
    torch._dynamo.reset()
    for name, fallback in hooks.FALLBACKS.items():
        if request.param in (name, "all"):
            monkeypatch.setattr(hooks, name, fallback)
    return request.param


@pytest.fixture
def siblings(monkeypatch):
    """Linked layers on a device where siblings are computed together, and the outputs they should have."""
    monkeypatch.setattr("cospadi.layers.siblings.joined.JOINED_ON", ("cpu",))
    spec = make_spec("free16", [f"m{i}" for i in range(len(D_OUT))], D_IN, D_OUT)
    layers = [FactoredLinear(spec, i, dtype=torch.float32) for i in range(len(D_OUT))]
    FactoredLinear.link(layers)
    dictionary = random_packed(spec.dictionary, torch.float32)
    codes = random_packed(spec.codes, torch.float32, seed=1)
    for role, tensor in dictionary.items():
        setattr(layers[0], dictionary_name(role), nn.Parameter(tensor, False))
    for role, tensor in codes.items():
        for layer, rows in zip(layers, tensor.split(D_OUT), strict=True):
            setattr(layer, codes_name(role), nn.Parameter(rows.clone(), tensor.is_floating_point()))
    for layer in layers:
        layer.requires_grad_(False)

    def wanted(x):
        return reference(x, dictionary, spec.dictionary, codes, spec.codes).float()

    return nn.ModuleList(layers), wanted


def outputs(layers, x):
    return torch.cat([layer(x) for layer in layers], -1)


def test_eager_siblings(without_hook, siblings):
    layers, wanted = siblings
    for tokens in (2, 17):
        x = torch.randn(tokens, D_IN)
        with torch.no_grad():
            torch.testing.assert_close(outputs(layers, x), wanted(x))
            first = layers[0](x)
            x.mul_(2.0)
            torch.testing.assert_close(torch.cat([first * 2, *(layer(x) for layer in list(layers)[1:])], -1), wanted(x))
        x.requires_grad_(True)
        outputs(layers, x).sum().backward()
        assert x.grad is not None


def test_compiled_siblings(without_hook, siblings):
    layers, wanted = siblings
    compiled = torch.compile(lambda h: outputs(layers, h), fullgraph=True, backend="aot_eager")
    conditional = torch.compile(
        lambda h: torch.cond(h.sum() > 0, lambda v: outputs(layers, v), lambda v: outputs(layers, 2 * v), (h,)),
        fullgraph=True,
        backend="aot_eager",
    )
    for tokens in (2, 17):
        x = torch.randn(tokens, D_IN).abs()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), wanted(x))
            torch.testing.assert_close(conditional(x), wanted(x))
        torch.testing.assert_close(compiled(x.requires_grad_(True)), wanted(x.detach()))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_siblings(without_hook, siblings, strict):
    layers, wanted = siblings

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, h):
            return outputs(self.layers, h)

    x = torch.randn(3, D_IN)
    program = torch.export.export(Block().eval(), (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), wanted(x))


def test_traced_by_jit(without_hook, siblings):
    layers, wanted = siblings
    x = torch.randn(3, D_IN)
    with torch.no_grad():
        traced = torch.jit.trace(lambda h: outputs(layers, h), (x,), check_trace=False)
        y = torch.randn(3, D_IN)
        torch.testing.assert_close(traced(y), wanted(y))


def test_transforms_are_told_that_there_is_no_rule(without_hook):
    spec = make_spec("free16", ["m0"], D_IN, (13,))
    case = random_packed(spec.dictionary), spec.dictionary, random_packed(spec.codes), spec.codes
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda v: factored_linear(v, *case).sum())(torch.randn(2, D_IN).bfloat16())


def test_a_hook_that_is_missing_or_raises_is_replaced():
    assert hooks.resolve("_C._no_such_hook", hooks.one_mode) is hooks.one_mode
    assert hooks.resolve("_C.no.such.module", hooks.one_mode) is hooks.one_mode
    assert hooks.resolve("tensor", hooks.one_mode) is hooks.one_mode  # raises without an argument
    assert hooks.resolve("is_grad_enabled", hooks.one_mode) is torch.is_grad_enabled


def test_this_version_of_pytorch_has_every_hook():
    """Else the package still works, but slower: adapt the hooks to the new version."""
    replaced = {name for name, fallback in hooks.FALLBACKS.items() if getattr(hooks, name) is fallback}
    assert replaced == set()
    assert getattr(torch.compiler, "_is_exporting_flag", None) is False
