import copy
import pickle
import weakref
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints.factory import KINDS, ROTATIONS, dense_rows, make_spec, random_factors
from cospadi.errors import ModelError
from cospadi.format import GroupSpec, part_of, split_codes
from cospadi.format.leaves import codes_name, dictionary_name, rotation_name
from cospadi.kernels import parse
from cospadi.kernels.group_op import as_one_matrix
from cospadi.layers import FactoredLinear, factor_tensors

D_IN, D_OUT = 24, (13, 7, 9)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def fill(layer: FactoredLinear, name: str, tensor: torch.Tensor) -> None:
    old = layer.get_parameter(name)
    assert old.shape == tensor.shape
    setattr(layer, name, nn.Parameter(tensor.to(old.dtype) if old.is_floating_point() else tensor, False))


def make_layers(
    kind: str, d_out: tuple[int, ...] = D_OUT, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.ModuleList, list[torch.Tensor]]:
    """Linked layers of one group, and their dense weights in float64 by an independent path."""
    spec = make_spec(kind, [f"m{i}" for i in range(len(d_out))], D_IN, d_out)
    factors = random_factors(spec, seed)
    layers = [FactoredLinear(spec, i, bias, dtype=dtype) for i in range(len(d_out))]
    FactoredLinear.link(layers)
    packed = factors.pack(spec, torch.bfloat16)
    for part, naming in (("dictionary", dictionary_name), ("rotation", rotation_name)):
        for role, tensor in part_of(packed, part).items():
            fill(layers[0], naming(role), tensor)
    for layer, codes in zip(layers, split_codes(spec, part_of(packed, "codes")), strict=True):
        for role, tensor in codes.items():
            fill(layer, codes_name(role), tensor)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return nn.ModuleList(layers), list(dense_rows(spec, factors).split(list(d_out)))


def expected(x: torch.Tensor, weight: torch.Tensor, layer: FactoredLinear) -> torch.Tensor:
    y = x.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


class Products(TorchDispatchMode):
    """Counts the products of the package: with a whole dictionary, with the codes of a whole group, with one's own."""

    def __init__(self):
        super().__init__()
        self.dictionary = self.group = self.own = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.cospadi.factored_linear.default:
            spec = parse(args[-1])
            if spec.rows == sum(D_OUT):
                self.group += 1
            elif spec.rows in D_OUT:
                self.own += 1
            else:
                self.dictionary += 1
        return function(*args, **(kwargs or {}))


def lie_joined(layers: nn.ModuleList) -> bool:
    return as_one_matrix([layer.packed_codes() for layer in layers]) is not None


def lay_apart(layers: nn.ModuleList) -> None:
    """Give every tensor a storage of its own: of some kinds those of a group lie in one storage as made."""
    for parameter in layers.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_out", [D_OUT, (11,)])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_the_dense_product(kind, d_out, bias):
    layers, weights = make_layers(kind, d_out, bias)
    for shape in ((5, D_IN), (2, 3, D_IN), (D_IN,), (0, D_IN)):
        x = torch.randn(shape)
        for layer, weight in zip(layers, weights, strict=True):
            torch.testing.assert_close(layer(x).double(), expected(x, weight, layer), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.dense_weight(torch.float64), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_the_stored_tensors(kind):
    spec = make_spec(kind, ["a.q", "a.k"], D_IN, (13, 7))
    for device in ("cpu", "meta"):
        layers = [FactoredLinear(spec, i, device=device) for i in range(2)]
        total = 0
        for index, layer in enumerate(layers):
            found = {n: (tuple(p.shape), p.dtype) for n, p in layer.named_parameters()}
            assert found == spec.tensors(index)
            assert {p.device.type for p in layer.parameters()} == {device}
            assert not any(p.requires_grad for p in layer.parameters())
            assert not any(name.endswith("weight") for name in found)
            assert not list(layer.buffers())
            total += sum(p.numel() * p.element_size() for p in layer.parameters())
        assert total == spec.bytes


def test_dense_weight_dtype_and_device():
    layers, weights = make_layers("free16", dtype=torch.bfloat16)
    assert layers[1].dense_weight().dtype == torch.bfloat16
    torch.testing.assert_close(layers[1].dense_weight().double(), weights[1], rtol=2**-8, atol=1e-6)


def test_siblings_share_one_product():
    layers, weights = make_layers("free16")
    with Products() as products:
        for _ in range(3):
            x = torch.randn(4, D_IN)
            for layer, weight in zip(layers, weights, strict=True):
                torch.testing.assert_close(layer(x).double(), expected(x, weight, layer), rtol=1e-5, atol=1e-5)
    assert (products.dictionary, products.own) == (3, 9)


def test_input_is_held_until_all_have_used_it_and_no_longer():
    layers, _ = make_layers("free16")
    x = torch.randn(4, D_IN)
    held = weakref.ref(x)
    layers[0](x), layers[1](x)
    del x
    assert held() is not None  # else another tensor could take its place and be mistaken for it
    layers[2](held())
    assert held() is None


@pytest.mark.parametrize("order", [(2, 1, 0), (1,), (0, 0, 1, 2), (1, 0, 1, 2, 2, 0), (2, 0, 2, 0)])
def test_any_order_of_calls_is_right(order):
    layers, weights = make_layers("word4")
    inputs = [torch.randn(4, D_IN), torch.randn(2, D_IN)]
    for x in (inputs[0], inputs[1], inputs[0]):
        for index in order:
            torch.testing.assert_close(
                layers[index](x).double(), expected(x, weights[index], layers[index]), rtol=1e-5, atol=1e-5
            )


def change_by_view(x):
    x[0].mul_(3.0)


@pytest.mark.parametrize("change", [lambda x: x.add_(1.0), change_by_view, lambda x: x.copy_(torch.randn_like(x))])
def test_changed_input_is_noticed(change):
    layers, weights = make_layers("free16")
    x = torch.randn(4, D_IN)
    layers[0](x)
    change(x)
    torch.testing.assert_close(layers[1](x).double(), expected(x, weights[1], layers[1]), rtol=1e-5, atol=1e-5)


def test_changed_input_is_noticed_in_inference_mode():
    layers, weights = make_layers("free16")
    with torch.inference_mode():
        x = torch.randn(4, D_IN)
        layers[0](x)
        x.add_(1.0)
        y = layers[1](x)
    torch.testing.assert_close(y.double(), expected(x, weights[1], layers[1]), rtol=1e-5, atol=1e-5)


def test_changed_dictionary_is_noticed():
    layers, weights = make_layers("free16")
    x = torch.randn(4, D_IN)
    layers[0](x)
    with torch.no_grad():
        layers[0].dictionary.mul_(2.0)
    torch.testing.assert_close(layers[1](x).double(), 2 * expected(x, weights[1], layers[1]), rtol=1e-5, atol=1e-5)
    layers[1](x), layers[0](x)
    layers[0].dictionary = nn.Parameter(layers[0].dictionary / 2, False)
    torch.testing.assert_close(layers[2](x).double(), expected(x, weights[2], layers[2]), rtol=1e-5, atol=1e-5)


def test_memo_never_crosses_autograd_modes():
    layers, _ = make_layers("free16")
    layers[0].dictionary.requires_grad_(True)
    x = torch.randn(4, D_IN)
    with torch.no_grad():
        layers[0](x)
    layers[1](x).sum().backward()
    assert layers[0].dictionary.grad is not None and bool(layers[0].dictionary.grad.any())


def test_gradients_equal_those_of_the_dense_product():
    layers, _ = make_layers("balanced8")
    x = torch.randn(5, D_IN, requires_grad=True)
    reference = x.detach().clone().requires_grad_(True)
    sum((layer(x) ** 2).sum() for layer in layers).backward()
    sum(((reference @ layer.dense_weight().T) ** 2).sum() for layer in layers).backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    layers, _ = make_layers("free16")
    for layer in layers:
        layer.values.requires_grad_(True)
    layers[0].dictionary.requires_grad_(True)
    parameters = [p for p in layers.parameters() if p.requires_grad]
    x = torch.randn(5, D_IN, requires_grad=True)

    def block(h):
        return layers[0](h) @ torch.cat([layers[1](h), layers[2](h)], 1)[:, :13].T

    plain = torch.autograd.grad(block(x).square().sum(), [x, *parameters])
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    for got, want in zip([x, *parameters], plain, strict=True):
        torch.testing.assert_close(got.grad, want)


def test_deepcopy_links_the_copies():
    layers, _ = make_layers("free16")
    x = torch.randn(4, D_IN)
    before = [layer(x) for layer in layers]
    layers[0](x)  # leaves something to remember
    copies = copy.deepcopy(layers)
    layers[0](x)
    with torch.no_grad():
        layers[0].dictionary.zero_()
    assert copies[1].siblings.owner is copies[0]
    for layer, y in zip(copies, before, strict=True):
        assert torch.equal(layer(x), y)


def test_pickles_hold_no_remembered_result():
    layers, _ = make_layers("free16")
    size = len(pickle.dumps(layers))
    x = torch.randn(500, D_IN)
    wanted = [layer(x) for layer in layers]
    layers[0](x)
    written = pickle.dumps(layers)
    assert len(written) < size + 1000
    again = pickle.loads(written)
    assert again[1].siblings.owner is again[0]
    assert all(torch.equal(layer(x), y) for layer, y in zip(again, wanted, strict=True))


def test_shapes_on_meta():
    layers, _ = make_layers("free16")
    layers.to("meta")
    for layer, rows in zip(layers, D_OUT, strict=True):
        y = layer(torch.empty(4, D_IN, device="meta"))
        assert y.shape == (4, rows) and y.device.type == "meta"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def joining(request, monkeypatch):
    """A device on which siblings with few tokens are computed together."""
    monkeypatch.setattr("cospadi.layers.siblings.joined.JOINED_ON", (request.param,))
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_joined_siblings(kind, joining):
    layers, weights = make_layers(kind, bias=True)
    layers.to(joining)
    lay_apart(layers)
    before = {name: p.clone() for name, p in layers.state_dict().items()}
    with torch.no_grad(), Products() as products:
        for shape in ((1, 1, D_IN), (2, 3, D_IN)):
            x = torch.randn(shape, device=joining)
            for layer, weight in zip(layers, weights, strict=True):
                y = layer(x)
                assert y.is_contiguous()
                wanted = x.double().cpu() @ weight.T + layer.bias.double().cpu()
                torch.testing.assert_close(y.double().cpu(), wanted, rtol=1e-4, atol=1e-4)
    # trellis tiles that end in padding do not make one matrix
    stacked = layers[0].group.stacked
    assert (products.group, products.dictionary, products.own) == ((2, 0, 0) if stacked else (0, 0, 6))
    held = weakref.ref(x)
    del x
    assert held() is None
    after = layers.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], p) for name, p in before.items())


def test_joining_can_be_undone(joining, tmp_path):
    layers, weights = make_layers("word4")
    layers.to(joining)
    lay_apart(layers)

    def check(joined=True):
        x = torch.randn(2, D_IN, device=joining)
        with torch.no_grad(), Products() as products:
            for layer in reversed(layers):
                wanted = x.double().cpu() @ layer.dense_weight(torch.float64).T.cpu()
                torch.testing.assert_close(layer(x).double().cpu(), wanted, rtol=1e-4, atol=1e-4)
        assert (products.group, products.own) == ((1, 0) if joined else (0, 3))
        assert lie_joined(layers) == joined

    check()
    # a file of views of one storage holds each tensor once and whole
    save_file(layers.state_dict(), tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: p.shape for n, p in layers.named_parameters()}
    assert all(torch.equal(tensor, layers.get_parameter(name).cpu()) for name, tensor in stored.items())
    assert (tmp_path / "x.safetensors").stat().st_size < 2 * layers[0].group.bytes + 4096
    # changed in place: seen through the view; also between two siblings
    x = torch.randn(2, D_IN, device=joining)
    with torch.no_grad():
        layers[0](x)
        layers[1].values_scales.mul_(2.0)
        wanted = 2 * x.double().cpu() @ weights[1].T
        torch.testing.assert_close(layers[1](x).double().cpu(), wanted, rtol=1e-4, atol=1e-4)
    check()
    # replaced: no longer joined
    layers[1].values_scales = nn.Parameter(layers[1].values_scales * 3, False)
    check(joined=False)
    # moved: joined anew
    layers.to("cpu").to(joining)
    check()
    # gradients asked for: computed apart
    layers[2].values_scales.requires_grad_(True)
    layers[2](x).sum().backward()
    assert bool(layers[2].values_scales.grad.any())
    # a copy is on its own
    twin = copy.deepcopy(layers)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
        twin[1].values_scales.zero_()
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, before, strict=True))


def test_many_tokens_are_computed_apart(joining):
    layers, _ = make_layers("word4")
    layers.to(joining)
    lay_apart(layers)
    x = torch.randn(17, D_IN, device=joining)
    with torch.no_grad(), Products() as products:
        for layer in layers:
            layer(x)
    assert (products.group, products.dictionary, products.own) == (0, 1, 3)
    assert lie_joined(layers)  # for the tokens that follow a prompt


def watched_programs():
    """A backend for torch.compile, and how often the package's operations stand in each of its programs."""
    programs = []

    def look(graph, inputs):
        found = Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if "cospadi" in str(node.target))
        programs.append(dict(found))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=look), programs


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_siblings_share_one_product(kind, joining):
    torch._dynamo.reset()
    layers, weights = make_layers(kind, bias=True)
    layers.to(joining)
    lay_apart(layers)
    backend, programs = watched_programs()
    compiled = torch.compile(lambda h: [layer(h) for layer in layers], fullgraph=True, backend=backend)

    def check():
        x = torch.randn(2, D_IN, device=joining)
        for y, weight, layer in zip(compiled(x), weights, layers, strict=True):
            assert y.is_contiguous()
            wanted = x.double().cpu() @ weight.T + layer.bias.double().cpu()
            torch.testing.assert_close(y.double().cpu(), wanted, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        check()
        if not layers[0].group.stacked:
            assert programs == [{"factored_linear": 3}]
            return
        assert programs == [{"factored_group": 1}]
        assert not lie_joined(layers)  # one operation, which multiplies with each layer's codes
        layers[0](torch.randn(1, D_IN, device=joining))
        assert lie_joined(layers)
        check()
        layers[1].values.data = layers[1].values.data.clone()  # moved behind the compiler's back
        assert not lie_joined(layers)
        check()
        assert len(programs) == 1
        compiled(torch.randn(17, D_IN, device=joining))
        assert len(programs) == 2
        assert programs[-1] == {"factored_linear": len(layers) + (layers[0].dictionary_spec is not None)}


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_within_a_condition(grad, joining):
    """Dynamo lets nothing be noted there."""
    torch._dynamo.reset()
    layers, weights = make_layers("free16")
    layers.to(joining)
    lay_apart(layers)

    def every(h):
        return torch.cat([layer(h) for layer in layers], -1)

    def block(h):
        return torch.cond(h.sum() > 0, every, lambda h: every(2 * h), (h,))

    x = torch.randn(2, D_IN, device=joining)
    wanted = x.double().cpu() @ torch.cat(weights).T
    with torch.set_grad_enabled(grad):
        for run in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
            for sign in (1, -1):
                y = run(sign * x)
                scale = sign if (sign * x).sum() > 0 else 2 * sign
                torch.testing.assert_close(y.double().cpu(), scale * wanted, rtol=1e-4, atol=1e-4)


def test_compiled_siblings_under_autocast(joining):
    torch._dynamo.reset()
    layers, weights = make_layers("word4", dtype=torch.bfloat16)
    layers.to(joining)
    compiled = torch.compile(lambda h: [layer(h) for layer in layers], fullgraph=True, backend="aot_eager")
    for tokens in (2, 17):
        x = torch.randn(tokens, D_IN, device=joining)
        with torch.no_grad(), torch.autocast(joining, torch.bfloat16):
            for y, weight in zip(compiled(x), weights, strict=True):
                wanted = (x.double().cpu() @ weight.T).float()
                torch.testing.assert_close(y.float().cpu(), wanted, rtol=0.05, atol=0.1)
                assert y.dtype == torch.bfloat16


def test_compiled_for_any_number_of_tokens(joining):
    torch._dynamo.reset()
    layers, weights = make_layers("free16")
    layers.to(joining)
    backend, programs = watched_programs()
    block = torch.compile(lambda h: [layer(h) for layer in layers], fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 3, 16, 17, 40):
            x = torch.randn(tokens, D_IN, device=joining)
            for y, weight in zip(block(x), weights, strict=True):
                torch.testing.assert_close(y.double().cpu(), x.double().cpu() @ weight.T, rtol=1e-4, atol=1e-4)
    assert [set(program) for program in programs] == [{"factored_group"}, {"factored_linear"}]


def call_one(layers, joining):
    """Run a program that asks the first sibling alone, and tell what became of its input."""
    torch._dynamo.reset()
    x = torch.randn(2, D_IN, device=joining)
    torch.compile(layers[0], backend="aot_eager")(x)
    return weakref.ref(x)


def test_an_unfinished_program_leaves_nothing(joining):
    layers, _ = make_layers("free16")
    layers.to(joining)
    with torch.no_grad():
        held = call_one(layers, joining)
        assert held() is not None  # its siblings may still ask, in the same program
        layers[1](torch.randn(2, D_IN, device=joining))
        assert held() is None
        held = call_one(layers, joining)
        assert held() is not None
        layers.to(joining, torch.float32)
        assert held() is None


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1,)])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_owner_on_another_device(home, order):
    layers, weights = make_layers("word4")
    away = "cuda" if home == "cpu" else "cpu"
    layers[0].to(home)
    layers[1].to(away), layers[2].to(away)
    x = torch.randn(4, D_IN)
    for index in order:
        y = layers[index](x.to(layers[index].values.device))
        assert y.device == layers[index].values.device
        wanted = expected(x, weights[index], layers[index])
        torch.testing.assert_close(y.double().cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1,), (1, 1, 0, 2)])
@pytest.mark.parametrize("kind", ["free16", "word4", "pruned"])
def test_offloaded_by_hooks(kind, order):
    from accelerate import cpu_offload

    layers, weights = make_layers(kind)
    cpu_offload(layers, torch.device("cpu"))
    assert layers[0].values.is_meta
    x = torch.randn(4, D_IN)
    with Products() as products:
        for index in order:
            y = layers[index](x).double()
            torch.testing.assert_close(y, expected(x, weights[index], layers[index]), rtol=1e-5, atol=1e-5)
    assert layers[0].values.is_meta
    if kind != "pruned" and len(set(order)) == len(order):
        assert products.dictionary == 1  # remembered although the dictionary has left again


def test_autocast_is_part_of_what_is_remembered():
    layers, _ = make_layers("free16", dtype=torch.bfloat16)
    x = torch.randn(4, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layers[0](x)
    assert y.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="bfloat16"):
        layers[1](x)


def test_unjoined_and_empty_layers_say_so():
    spec = make_spec("free16", ["m0", "m1"], D_IN, (5, 6))
    lonely = FactoredLinear(spec, 1)
    with pytest.raises(ModelError, match=r"m1.*not joined"):
        lonely(torch.randn(2, D_IN, dtype=torch.bfloat16))
    empty = FactoredLinear(make_spec("free16", ["m0"], D_IN, (5,)), 0, device="meta")
    with pytest.raises(ModelError, match=r"m0.*no data"):
        empty(torch.randn(2, D_IN))
    with pytest.raises(ValueError, match="in order"):
        FactoredLinear.link([lonely, FactoredLinear(spec, 0)])


def test_repr_is_readable():
    text = str(make_layers("word4")[0][1])
    for part in ("in_features=24", "out_features=7", "20 atoms of 4 bits in m0", "(11:32), 4 bits per 3"):
        assert part in text, text


@pytest.mark.parametrize("kind", ["free16", "pruned8"])
def test_compiles_whole_and_equals_eager(kind):
    layers, _ = make_layers(kind, bias=True)

    def block(h):
        return torch.cat([layer(h) for layer in layers], -1)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(4, D_IN), torch.randn(6, D_IN)):
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_a_free_batch(strict, grad, joining):
    layers, _ = make_layers("free16", bias=True)
    layers.to(joining)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, h):
            return torch.cat([layer(h) for layer in self.layers], -1)

    block = Block().eval()
    layers[0].dictionary.requires_grad_(grad)
    batch = torch.export.Dim("batch", min=2, max=64)
    example = torch.randn(3, D_IN, device=joining)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(block, (example,), dynamic_shapes=({0: batch},), strict=strict)
        x = torch.randn(19, D_IN, device=joining)
        torch.testing.assert_close(program.module()(x), block(x))
    products = sum("factored_linear" in str(node.target) for node in program.graph.nodes)
    # x D once, unless there may be a backward pass, or nothing may be left behind
    assert products == (2 * len(layers) if grad or strict else len(layers) + 1)
    assert sum("dictionary" in name for name in program.state_dict) == 1


def test_state_dict_round_trip():
    layers, _ = make_layers("zeros3", bias=True, seed=1)
    others, _ = make_layers("zeros3", bias=True, seed=2)
    x = torch.randn(3, D_IN)
    assert not torch.equal(layers[1](x), others[1](x))
    others.load_state_dict(layers.state_dict())
    assert torch.equal(layers[1](x), others[1](x))


def test_group_spec_is_kept():
    spec = make_spec("free16", ["m0"], D_IN, (5,))
    layer = FactoredLinear(spec, 0)
    assert isinstance(layer.group, GroupSpec) and layer.group == spec and layer.name == "m0"


class Transforms:
    """Counts the transforms of inputs."""

    def __init__(self, monkeypatch):
        self.count, real = 0, factor_tensors.rotated

        def counted(*arguments):
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(factor_tensors, "rotated", counted)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_siblings_share_one_transform(kind, monkeypatch):
    layers, weights = make_layers(kind)
    transforms = Transforms(monkeypatch)
    for gradient in (False, True):
        x = torch.randn(20, D_IN, requires_grad=gradient)
        for layer, weight in zip(layers, weights, strict=True):
            torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)
    assert transforms.count == 2
    x = torch.randn(2, D_IN)
    layers[0](x)
    for name in ("rotation_signs", "rotation_scales"):
        if hasattr(layers[0], name):
            with torch.no_grad():
                layers[0].get_parameter(name).neg_()
            wanted = x.double() @ layers[1].dense_weight(torch.float64).T
            torch.testing.assert_close(layers[1](x).double(), wanted, rtol=1e-4, atol=1e-4)  # not the remembered one


def test_whole_tiles_of_siblings_are_joined(joining):
    """Modules whose rows are whole tiles, the last one excepted, are one stored matrix."""
    layers, weights = make_layers("trellis2", (16, 32, 7), bias=True)
    layers.to(joining)
    lay_apart(layers)
    assert layers[0].group.stacked
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(3, D_IN, device=joining)
            for layer, weight in zip(layers, weights, strict=True):
                wanted = x.double().cpu() @ weight.T + layer.bias.double().cpu()
                torch.testing.assert_close(layer(x).double().cpu(), wanted, rtol=1e-4, atol=1e-4)
            assert lie_joined(layers)
        torch._dynamo.reset()
        compiled = torch.compile(lambda h: [layer(h) for layer in layers], fullgraph=True, backend="aot_eager")
        for y, weight, layer in zip(compiled(x), weights, layers, strict=True):
            wanted = x.double().cpu() @ weight.T + layer.bias.double().cpu()
            torch.testing.assert_close(y.double().cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_gradients_of_scales(kind):
    """In x, and in the scales that tuning trains: of the rotation, of the dictionary and of the values."""
    layers, _ = make_layers(kind, (13, 7))
    layers.double()
    names = [n for n, p in layers.named_parameters() if n.endswith("scales") and p.is_floating_point()]
    assert ("0.rotation_scales" in names) == (kind == "trellis2") and "1.values_scales" in names
    for parameter in layers.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    values = [layers.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def outputs(x, *scales):
        given = dict(zip(names, scales, strict=True))
        return torch.func.functional_call(Both(layers), {f"layers.{n}": t for n, t in given.items()}, (x,))

    assert torch.autograd.gradcheck(outputs, (x, *values))
    sum(layer(x).square().sum() for layer in layers).backward()
    assert all(layers.get_parameter(name).grad.abs().sum() > 0 for name in names)


class Both(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_half_precision_of_rotated_layers(kind, dtype):
    layers, weights = make_layers(kind, dtype=dtype)
    x = torch.randn(5, D_IN).to(dtype)
    for layer, weight in zip(layers, weights, strict=True):
        y = layer(x)
        assert y.dtype == dtype
        exact = x.double() @ weight.T
        assert float((y.double() - exact).norm() / exact.norm()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotated_layers_compile_and_export(kind):
    layers, weights = make_layers(kind)
    model = Both(layers)
    x = torch.randn(4, D_IN)
    wanted = x.double() @ torch.cat(weights).T
    torch._dynamo.reset()
    for backend in ("aot_eager", "inductor"):
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend=backend)(x).double(), wanted, rtol=1e-4, atol=1e-4
        )
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x[:3]).double(), wanted[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_offloaded_rotations(kind):
    """accelerate keeps the parameters elsewhere and brings them at each call."""
    from accelerate import cpu_offload

    layers, weights = make_layers(kind)
    model = Both(layers)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        for tokens in (2, 20):
            x = torch.randn(tokens, D_IN)
            wanted = x.double() @ torch.cat(weights).T
            torch.testing.assert_close(model(x).double(), wanted, rtol=1e-4, atol=1e-4)
