"""The operation inside PyTorch: operator contract, gradients, compiled and exported programs."""

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cospadi.format import MatrixSpec, Trellis
from cospadi.kernels import describe, factored_group, factored_linear, parse, reference
from cospadi.kernels.group_op import as_one_matrix
from cospadi.kernels.op import ROLES
from cospadi.kernels.synthetic import random_packed


def case(
    d_in, atoms, rows, pattern="3:8", bits=16, dictionary_bits=16, dtype=torch.float64, group=0, nonzeros=0, **more
):
    codes_spec = MatrixSpec(rows, atoms, pattern, nonzeros, bits, group, **more)
    codes = random_packed(codes_spec, dtype)
    if dictionary_bits == 0:
        return None, None, codes, codes_spec
    spec = MatrixSpec(atoms, d_in, bits=dictionary_bits)
    return random_packed(spec, dtype, seed=1), spec, codes, codes_spec


def arguments(x, dictionary, dictionary_spec, codes, codes_spec):
    tensors = [(dictionary or {}).get(role) for role in ROLES] + [codes.get(role) for role in ROLES]
    return (x, *tensors, describe(dictionary_spec), describe(codes_spec))


class Layer(nn.Module):
    def __init__(self, dictionary, dictionary_spec, codes, codes_spec):
        super().__init__()
        self.specs = (dictionary_spec, codes_spec)
        self.has_dictionary = dictionary is not None
        for prefix, packed in (("d_", dictionary or {}), ("c_", codes)):
            for role, tensor in packed.items():
                self.register_parameter(prefix + role, nn.Parameter(tensor, tensor.is_floating_point()))

    def forward(self, x):
        packed = {"d_": {}, "c_": {}}
        for name, tensor in self._parameters.items():
            packed[name[:2]][name[2:]] = tensor
        dictionary = packed["d_"] if self.has_dictionary else None
        return factored_linear(x, dictionary, self.specs[0], packed["c_"], self.specs[1])


KINDS = [
    {},
    {"bits": 8, "dictionary_bits": 8},
    {"bits": 4, "dictionary_bits": 4, "group": 3},
    {"pattern": "free", "nonzeros": 4, "dictionary_bits": 0},
    {"pattern": "dense", "bits": 16},
    {"pattern": "dense", "bits": 2, "half": True, "group": 3, "symmetric": False},
    {"pattern": "dense", "bits": 3, "dictionary_bits": 0, "trellis": Trellis(10, 4, 16)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(kind):
    made = case(9, 9 if kind.get("dictionary_bits") == 0 else 11, 7, **kind)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.cospadi.factored_linear.default, arguments(x, *made))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "trellis" not in kind], ids=str)
def test_all_layers_of_a_group(kind, joined):
    dictionary, spec, codes, codes_spec = case(9, 9 if kind.get("dictionary_bits") == 0 else 11, 12, **kind)
    parts = [{role: t[rows] for role, t in codes.items()} for rows in (slice(5), slice(5, 6), slice(6, None))]
    if not joined:
        parts[1] = {role: tensor.clone() for role, tensor in parts[1].items()}
    assert (as_one_matrix(parts) is not None) == joined
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    expected = reference(x, dictionary, spec, codes, codes_spec)
    assert torch.allclose(factored_group(x, dictionary, spec, parts, codes_spec), expected)
    lists = [[part[role] for part in parts if role in part] for role in ROLES]
    atoms = [(dictionary or {}).get(role) for role in ROLES]
    given = (x, *atoms, *lists, describe(spec), describe(codes_spec))
    torch.library.opcheck(torch.ops.cospadi.factored_group.default, given)


@pytest.mark.parametrize("joined", [True, False])
def test_joined_codes_take_one_product(joined):
    dictionary, spec, codes, codes_spec = case(9, 11, 12)
    parts = [{role: t[rows] for role, t in codes.items()} for rows in (slice(5), slice(5, 6), slice(6, None))]
    if not joined:
        parts = [{role: tensor.clone() for role, tensor in part.items()} for part in parts]
    with torch.profiler.profile() as profile:
        factored_group(torch.randn(2, 9, dtype=torch.float64), dictionary, spec, parts, codes_spec)
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::linear")
    assert products == (2 if joined else 4)  # x D, then the codes of all or of each layer


def test_what_does_not_lie_in_one_piece():
    whole = torch.arange(24.0).view(6, 4)
    joined = as_one_matrix([{"values": whole[1:3]}, {"values": whole[3:]}])
    assert torch.equal(joined["values"], whole[1:])
    for parts in (
        [whole[3:], whole[:3]],
        [whole[:2], whole[3:]],
        [whole[:3, :2], whole[3:, :2]],
        [whole[:2], whole[2:].int()],
    ):
        assert as_one_matrix([{"values": part} for part in parts]) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_everything_that_has_one(kind):
    made = case(9, 9 if kind.get("dictionary_bits") == 0 else 11, 7, **kind)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    inputs = arguments(x, *made)
    floats = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    for tensor in floats:
        tensor.requires_grad_()

    def function(*given):
        given = iter(given)
        return torch.ops.cospadi.factored_linear(*[next(given) if any(t is f for f in floats) else t for t in inputs])

    assert len(floats) == (2 if made[0] is None else 3)
    assert torch.autograd.gradcheck(function, floats)


def test_only_the_gradients_that_are_needed():
    made = case(9, 11, 7)
    made[2]["values"].requires_grad_()
    factored_linear(torch.randn(4, 9, dtype=torch.float64), *made).sum().backward()
    assert made[2]["values"].grad.shape == made[2]["values"].shape
    assert made[0]["values"].grad is None
    x = torch.randn(0, 9, dtype=torch.float64, requires_grad=True)
    factored_linear(x, *made).sum().backward()
    assert x.grad.shape == (0, 9)


def test_specs_survive_as_strings():
    for spec in (
        MatrixSpec(7, 100, "free", 31, 8, 7, symmetric=False),
        MatrixSpec(3, 65, "5:16", 0, 14),
        MatrixSpec(3, 65),
    ):
        assert parse(describe(spec)) == spec
    assert describe(None) == ""


def test_compiled_model_of_unequal_layers():
    torch._dynamo.reset()
    model = nn.Sequential(
        Layer(*case(12, 20, 16, dtype=torch.float32)),
        Layer(*case(16, 9, 24, bits=8, dictionary_bits=8, dtype=torch.float32)),
        Layer(*case(24, 24, 12, dictionary_bits=0, dtype=torch.float32)),
        Layer(*case(12, 20, 16, pattern="dense", dtype=torch.float32)),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (2, 3, 5):
        x = torch.randn(tokens, 12)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        model.zero_grad()
        model(x).square().sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(expected) == 7
        model.zero_grad()
        compiled(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                assert torch.allclose(parameter.grad, expected[name], atol=1e-4), name


def test_exported_with_a_dynamic_batch():
    made = case(12, 20, 16, bits=8, dtype=torch.float32)
    layer = Layer(*made)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 12),), dynamic_shapes=({0: batch},), strict=True)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for tokens in (1, 7, 64):
        x = torch.randn(tokens, 12)
        assert torch.allclose(loaded(x).double(), reference(x, *made), atol=1e-5)


class Watch(TorchDispatchMode):
    """Notes the package's operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_nothing_observes_goes_past_the_dispatcher_and_gives_the_same(kind):
    made = case(9, 9 if kind.get("dictionary_bits") == 0 else 11, 7, **kind)
    for shape in [(2, 3, 9), (1, 9), (9,), (0, 9)]:
        x = torch.randn(shape, dtype=torch.float64)
        through = torch.ops.cospadi.factored_linear(*arguments(x, *made))
        torch.testing.assert_close(factored_linear(x, *made), through, rtol=0, atol=0)
        assert through.shape == (*shape[:-1], 7)


def test_who_observes_sees_the_operation():
    made = case(9, 11, 7)
    x = torch.randn(2, 9, dtype=torch.float64)
    with Watch() as watch:
        factored_linear(x, *made)
    assert "cospadi.factored_linear.default" in watch.seen
    asked = x.clone().requires_grad_(True)
    assert factored_linear(asked, *made).grad_fn is not None
    with torch.no_grad():
        assert factored_linear(asked, *made).grad_fn is None
    with pytest.raises(RuntimeError, match="functorch"):  # a transform has no rule for it, and must be told so
        torch.func.grad(lambda v: factored_linear(v, *made).sum())(x)
