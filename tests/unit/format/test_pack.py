import pytest
import torch

from checkpoints.factory import KINDS, make_spec, random_stored
from cospadi.format import MatrixSpec, Stored, pack, unpack
from cospadi.format.pack import decode_values, pack_bits, pack_mask, unpack_bits, unpack_mask
from cospadi.kernels.decode import dense_rows


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("count", [1, 2, 7, 31, 32, 33, 64, 95, 200])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 11, 14, 16])
def test_bits_round_trip(bits, count):
    levels = torch.randint(0, 2**bits, (3, count))
    levels[0] = 2**bits - 1
    words = pack_bits(levels, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-count * bits // 32))
    assert torch.equal(unpack_bits(words, bits, count).long(), levels)


@pytest.mark.parametrize("bits", [1, 3, 4, 14])
def test_bit_order_is_that_of_the_format(bits):
    """Against a bit stream written in plain Python: value i at bits [i b, (i+1) b), little-endian words."""
    levels = torch.randint(0, 2**bits, (2, 37))
    for row, words in zip(levels.tolist(), pack_bits(levels, bits).tolist(), strict=True):
        stream = sum(value << (i * bits) for i, value in enumerate(row))
        expected = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(words))]
        assert [word & 0xFFFFFFFF for word in words] == expected


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 70])
def test_mask_round_trip(columns):
    mask = torch.rand(5, columns) < 0.4
    words = pack_mask(mask)
    assert torch.equal(unpack_mask(words, columns), mask)
    column = columns - 1
    bit = (words[:, column // 32].long() >> (column % 32)) & 1
    assert torch.equal(bit.bool(), mask[:, column])


def stored_matrices():
    """Every kind's codes and dictionary; trellis codes have tests of their own in test_trellis.py."""
    for kind in KINDS:
        for part in ("codes", "dictionary"):
            spec = getattr(make_spec(kind, ["m"], 37, (11,), atoms=41), part)
            if spec is not None and spec.trellis is None:
                yield pytest.param(spec, id=f"{kind}-{part}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spec", stored_matrices())
def test_matrix_round_trip(spec, seed):
    stored = random_stored(spec, torch.Generator().manual_seed(seed), torch.bfloat16)
    packed = pack(stored, spec)
    assert {role: (tuple(t.shape), t.dtype) for role, t in packed.items()} == spec.tensors()
    assert sum(t.numel() * t.element_size() for t in packed.values()) == spec.bytes
    rebuilt = unpack(packed, spec, torch.float64)
    if spec.integer:
        assert torch.equal(rebuilt.float(), stored.matrix)
    else:
        # half a unit of bfloat16's last bit, then half a unit two bits above it
        rounding = 2.0**-8 + (2.0**-6 if spec.bits == 14 else 0.0)
        torch.testing.assert_close(rebuilt.float(), stored.matrix, rtol=rounding, atol=0)
    if spec.sparse:
        assert torch.equal(unpack_mask(packed["mask"], spec.columns), stored.support)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_half_steps_by_hand(bits):
    """Symmetric: 2^bits levels about zero. With zero points: those at odd half steps, one bit more each."""
    high = 2**bits - 1
    even = MatrixSpec(1, high + 1, bits=bits, half=True)
    values = torch.arange(high + 1)[None].float() - high / 2
    packed = pack(Stored(values * 0.5, torch.full((1, 1), 0.5)), even)
    assert unpack_bits(packed["values"], bits, high + 1).tolist() == [list(range(high + 1))]
    assert torch.equal(unpack(packed, even), values * 0.5)
    odd = MatrixSpec(1, 4, bits=bits, group=2, symmetric=False, half=True)
    zeros = torch.tensor([[0.5, high - 0.5]])
    matrix = torch.tensor([[-0.5, 0.5, -high + 0.5, 0.5]])
    packed = pack(Stored(matrix, torch.ones(1, 2), zeros), odd)
    assert unpack_bits(packed["values"], bits, 4).tolist() == [[0, 1, 0, high]]
    assert unpack_bits(packed["zeros"], bits + 1, 2).tolist() == [[1, 2 * high - 1]]
    assert torch.equal(unpack(packed, odd), matrix)
    assert odd.tensors()["zeros"] == ((1, 1), torch.int32)


@pytest.mark.parametrize("options", [{}, {"symmetric": False, "group": 7}, {"half": True}, {"pattern": "9:16"}])
@pytest.mark.parametrize("bits", [5, 6])
def test_integers_between_four_and_eight_bits(bits, options):
    spec = MatrixSpec(11, 41, bits=bits, **options)
    stored = random_stored(spec, torch.Generator().manual_seed(bits), torch.bfloat16)
    packed = pack(stored, spec)
    assert {role: (tuple(t.shape), t.dtype) for role, t in packed.items()} == spec.tensors()
    assert torch.equal(unpack(packed, spec), stored.matrix)
    assert torch.equal(dense_rows(packed, spec, torch.float32), stored.matrix)
    assert spec.version == 2


def test_values_stand_in_column_order():
    matrix = torch.tensor([[0.0, 3.0, 0.0, -1.0, 2.0]])
    spec = MatrixSpec(1, 5, "free", 3)
    packed = pack(Stored(matrix), spec)
    assert decode_values(packed, spec, torch.float32).tolist() == [[3.0, -1.0, 2.0]]


def test_support_may_hold_zeros():
    """A zero inside the given support is stored as a value; without the support it would not be found again."""
    mask = torch.tensor([[True, True, False, False]])
    packed = pack(Stored(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), support=mask), MatrixSpec(1, 4, "2:4"))
    assert torch.equal(unpack_mask(packed["mask"], 4), mask)


def test_fourteen_bits_round_to_nearest():
    values = torch.randn(4, 33) * 10.0 ** torch.randint(-20, 20, (4, 33))
    spec = MatrixSpec(4, 33, bits=14)
    got = unpack(pack(Stored(values), spec), spec, torch.float64)
    coarse = values.to(torch.bfloat16).double()
    assert bool(((got - coarse).abs() <= coarse.abs() * 2.0**-6).all())
    again = unpack(pack(Stored(got.float()), spec), spec, torch.float64)
    assert torch.equal(again, got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_take_the_dtype_asked_for(dtype):
    spec = make_spec("balanced8", ["m"], 24, (6,)).codes
    packed = pack(random_stored(spec, torch.Generator().manual_seed(0), dtype), spec, dtype)
    assert packed["scales"].dtype == dtype


def test_what_does_not_fit_is_refused():
    spec = MatrixSpec(2, 8, "free", 3)
    with pytest.raises(ValueError, match="the spec says"):
        pack(Stored(torch.zeros(2, 9)), spec)
    with pytest.raises(ValueError, match="3 non-zeros"):
        pack(Stored(torch.ones(2, 8)), spec)
    with pytest.raises(ValueError, match="3 non-zeros"):
        pack(Stored(torch.zeros(2, 8), support=torch.zeros(2, 8, dtype=torch.bool)), spec)
    with pytest.raises(ValueError, match="scales"):
        pack(Stored(torch.ones(2, 8)), MatrixSpec(2, 8, bits=4))
    with pytest.raises(ValueError, match="zero points"):
        pack(Stored(torch.ones(2, 8), scales=torch.ones(2, 1)), MatrixSpec(2, 8, bits=4, symmetric=False))
