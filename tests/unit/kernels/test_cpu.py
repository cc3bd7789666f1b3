"""The operation on CPU against float64, over patterns, bits, scales and awkward shapes."""

import pytest
import torch

from cospadi.format import MatrixSpec, Stored, Trellis, pack, unpack
from cospadi.format.pack import pack_bits
from cospadi.kernels import cpu, describe, factored_linear, parse, reference
from cospadi.kernels.cost import rebuild_pays
from cospadi.kernels.decode import dense_rows
from cospadi.kernels.synthetic import random_packed

CODES = [
    ("dense", 0, 16, 0, True),
    ("dense", 0, 8, 0, True),
    ("dense", 0, 4, 32, True),
    ("dense", 0, 3, 16, False),
    ("free", 31, 16, 0, True),
    ("free", 31, 8, 0, True),
    ("free", 31, 8, 7, False),
    ("free", 1, 14, 0, True),
    ("free", 31, 4, 8, True),
    ("2:4", 0, 16, 0, True),
    ("3:8", 0, 8, 0, True),
    ("5:16", 0, 4, 0, True),
    ("16:32", 0, 2, 5, False),
    ("32:32", 0, 16, 0, True),
]
DICTIONARIES = [None, (16, 0, True), (8, 0, True), (8, 16, True), (4, 16, False), (3, 0, True), (14, 0, True)]
SHAPES = [(37, 45, 51), (64, 64, 64), (5, 97, 3), (40, 33, 129)]


def make(shape, dictionary, codes, dtype=torch.float32, seed=0):
    d_in, atoms, rows = shape
    if dictionary is None:
        atoms = d_in
    pattern, nonzeros, bits, group, symmetric = codes
    codes_spec = MatrixSpec(rows, atoms, pattern, min(nonzeros, atoms), bits, group, symmetric)
    packed = random_packed(codes_spec, dtype, seed=seed)
    if dictionary is None:
        return None, None, packed, codes_spec
    bits, group, symmetric = dictionary
    spec = MatrixSpec(atoms, d_in, bits=bits, group=group, symmetric=symmetric)
    return random_packed(spec, dtype, seed=seed + 1), spec, packed, codes_spec


def error(y, exact):
    assert y.shape == exact.shape
    assert bool(y.isfinite().all())
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_of_every_kind(shape, codes):
    case = make(shape, (16, 0, True), codes)
    x = torch.randn(3, shape[0], generator=torch.Generator().manual_seed(9))
    assert error(factored_linear(x, *case), reference(x, *case)) < 2e-6


@pytest.mark.parametrize("dictionary", DICTIONARIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dictionaries_of_every_kind(shape, dictionary):
    case = make(shape, dictionary, ("free", 5, 8, 0, True))
    x = torch.randn(2, 2, shape[0], generator=torch.Generator().manual_seed(8))
    assert error(factored_linear(x, *case), reference(x, *case)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_half_precision(dtype, tokens):
    case = make((96, 80, 72), (16, 0, True), ("16:32", 0, 8, 0, True), dtype)
    x = torch.randn(tokens, 96).to(dtype)
    y = factored_linear(x, *case)
    assert y.dtype == dtype
    assert error(y, reference(x, *case)) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_many_blocks_give_what_one_gives(monkeypatch, tokens):
    case = make((37, 45, 51), (8, 7, True), ("5:16", 0, 8, 0, True))
    x = torch.randn(tokens, 37)
    whole = factored_linear(x, *case)
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 7 * 45)
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS_MANY", 45)
    assert torch.allclose(factored_linear(x, *case), whole, atol=1e-5)


TRELLIS_CASES = [
    (MatrixSpec(101, 45, bits=2, trellis=Trellis(12, 4, 16)), None),
    (MatrixSpec(64, 37, bits=3, trellis=Trellis(16, 4, 64)), MatrixSpec(37, 45, bits=4, symmetric=False, half=True)),
    (MatrixSpec(70, 60, bits=1, trellis=Trellis(8, 8, 8)), MatrixSpec(60, 9, bits=4, trellis=Trellis(10, 1, 64))),
    (MatrixSpec(33, 60, "9:16", bits=3, half=True), MatrixSpec(60, 9, bits=2, trellis=Trellis(10, 64, 1))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40, 200])
@pytest.mark.parametrize("specs", TRELLIS_CASES, ids=str)
def test_trellis_codes_and_half_steps(monkeypatch, specs, tokens, dtype):
    """Codes and dictionaries, in one block and in many, also where D S is rebuilt."""
    codes_spec, spec = specs
    dictionary = None if spec is None else random_packed(spec, dtype, seed=1)
    case = dictionary, spec, random_packed(codes_spec, dtype), codes_spec
    x = torch.randn(tokens, (spec or codes_spec).columns).to(dtype)
    limit = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for elements in (None, 100, 1):
        if elements is not None:
            monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", elements)
            monkeypatch.setattr(cpu, "BLOCK_ELEMENTS_MANY", elements)
        assert error(factored_linear(x, *case), reference(x, *case)) < limit


@pytest.mark.parametrize("specs", TRELLIS_CASES, ids=str)
def test_descriptions_of_new_specs(specs):
    for spec in specs:
        assert spec is None or parse(describe(spec)) == spec


def test_rebuilding_gives_the_same():
    case = make((8, 60, 9), (8, 0, True), ("16:32", 0, 4, 0, True))
    assert not rebuild_pays(4, case[1], case[3])
    assert rebuild_pays(5, case[1], case[3])
    x = torch.randn(1000, 8)
    assert error(factored_linear(x, *case), reference(x, *case)) < 2e-6
    assert not rebuild_pays(10**9, None, case[3])


@pytest.mark.parametrize("dictionary", [None, (16, 0, True)], ids=str)
def test_empty_and_strided_inputs(dictionary):
    case = make((20, 16, 33), dictionary, ("2:4", 0, 16, 0, True))
    assert factored_linear(torch.randn(0, 20), *case).shape == (0, 33)
    assert factored_linear(torch.randn(4, 0, 20), *case).shape == (4, 0, 33)
    assert factored_linear(torch.randn(20), *case).shape == (33,)
    x = torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    assert not x.is_contiguous()
    assert error(factored_linear(x, *case), reference(x, *case)) < 2e-6


def test_errors_say_what_is_wrong():
    case = make((20, 16, 33), (8, 0, True), ("2:4", 0, 16, 0, True), torch.bfloat16)
    with pytest.raises(TypeError, match=r"x is torch.float32, the layer's scales are torch.bfloat16"):
        factored_linear(torch.randn(2, 20), *case)
    with pytest.raises(TypeError, match="reads a float tensor"):
        factored_linear(torch.ones(2, 20, dtype=torch.int64), *case)
    with pytest.raises(ValueError, match="x has 21 features, the layer reads 20"):
        factored_linear(torch.randn(2, 21).bfloat16(), *case)
    with pytest.raises(ValueError, match="give both or neither"):
        factored_linear(torch.randn(2, 20).bfloat16(), None, *case[1:])
    other = MatrixSpec(33, 12, "2:4", 0, 16)
    with pytest.raises(ValueError, match="codes read 12 atoms, the dictionary has 16"):
        factored_linear(torch.randn(2, 20).bfloat16(), case[0], case[1], random_packed(other), other)


def test_autocast_casts_x_to_the_stored_floats():
    case = make((20, 16, 33), (16, 0, True), ("2:4", 0, 16, 0, True), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert factored_linear(torch.randn(2, 20), *case).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("codes", [*CODES, ("dense", 0, 4, 7, True), ("free", 29, 2, 16, True)], ids=str)
def test_fast_decoding_equals_the_format(codes, dtype):
    pattern, nonzeros, bits, group, symmetric = codes
    spec = MatrixSpec(19, 77, pattern, nonzeros, bits, group, symmetric)
    packed = random_packed(spec, dtype, seed=3)
    before = {role: tensor.clone() for role, tensor in packed.items()}
    assert torch.equal(dense_rows(packed, spec, dtype), unpack(packed, spec, dtype))
    assert all(torch.equal(tensor, before[role]) for role, tensor in packed.items())


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_random_matrices_are_what_pack_gives(codes):
    pattern, nonzeros, bits, group, symmetric = codes
    spec = MatrixSpec(19, 77, pattern, nonzeros, bits, group, symmetric)
    packed = random_packed(spec, torch.float32, seed=4)
    expected = spec.tensors(torch.float32)
    assert {role: (tuple(t.shape), t.dtype) for role, t in packed.items()} == expected
    if not symmetric:
        return  # zero points are random there: pack is given levels, not these
    matrix = unpack(packed, spec, torch.float64)
    support = None
    if spec.sparse:
        bits_of = (packed["mask"].unsqueeze(-1) >> torch.arange(32)) & 1
        support = bits_of.view(19, -1)[:, :77].bool()
    again = pack(Stored(matrix, packed.get("scales"), support=support), spec, torch.float32)
    for role, tensor in packed.items():
        assert torch.equal(again[role], tensor), role


def test_a_value_beyond_the_row_is_never_read():
    """Bits of the last word past the last column are zero, and the values of a row end where the next row's begin."""
    spec = MatrixSpec(2, 33, "free", 2, 16)
    mask = torch.zeros(2, 33, dtype=torch.int64)
    mask[0, [0, 32]] = 1
    mask[1, [1, 32]] = 1
    packed = {"values": torch.tensor([[1.0, 2.0], [4.0, 8.0]]), "mask": pack_bits(mask, 1)}
    x = torch.eye(33)
    y = factored_linear(x, None, None, packed, spec)
    assert y[0].tolist() == [1.0, 0.0]
    assert y[1].tolist() == [0.0, 4.0]
    assert y[32].tolist() == [2.0, 8.0]
