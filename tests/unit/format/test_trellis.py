"""Trellis codes: the stored bits, the levels, and the matrix, against the definition in plain Python."""

import pytest
import torch

from checkpoints.factory import random_symbols
from cospadi.format import GroupSpec, MatrixSpec, Rotation, Stored, Trellis, pack, unpack
from cospadi.format.group import Factors
from cospadi.format.pack import unpack_symbols
from cospadi.format.trellis import decode_tiles, level_table


def level(state: int) -> int:
    """The codebook: the sum of the four bytes of a product of 32 bits."""
    return sum((0x83DCD12D * state % 2**32).to_bytes(4, "little")) - 510


def tile_levels(words: list[int], bits: int, state: int) -> list[int]:
    """Levels of one tile, read bit by bit from its circular stream."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    length = 32 * len(words)
    circular = stream | stream << length
    return [level(circular >> (t * bits) & (2**state - 1)) for t in range(length // bits)]


@pytest.mark.parametrize("state", [1, 8, 12, 16])
def test_level_table_is_the_hash(state: int) -> None:
    table = level_table(state)
    assert table.tolist() == [level(s) for s in range(2**state)]
    if state == 16:
        assert abs(float(table.mean())) < 1 and 147 < float(table.std()) < 148.5
        assert float(table.min()) >= -510 and float(table.max()) <= 510


@pytest.mark.parametrize("values", [64, 128, 256])
@pytest.mark.parametrize("state", [8, 10, 12, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tiles_decode_as_the_definition_says(bits: int, state: int, values: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3, values * bits // 32)).to(torch.int32)
    assert decode_tiles(words, bits, state).tolist() == [tile_levels(tile, bits, state) for tile in words.tolist()]


SHAPES = [
    (1, 1, 4, 16),
    (37, 41, 4, 16),
    (64, 64, 4, 64),
    (65, 7, 8, 32),
    (130, 50, 16, 16),
    (3, 200, 64, 1),
    (9, 5, 1, 64),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_round_trip(bits: int, rows: int, columns: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    spec = MatrixSpec(rows, columns, bits=bits, trellis=Trellis(12, inputs, outputs))
    assert spec.trellis is not None
    tiles = spec.trellis.tiles(rows, columns)[0]
    stored = random_symbols(spec, tiles, torch.Generator().manual_seed(rows), dtype)
    packed = pack(stored, spec, dtype)
    assert {role: (tuple(t.shape), t.dtype) for role, t in packed.items()} == spec.tensors(dtype)
    assert sum(t.numel() * t.element_size() for t in packed.values()) == spec.bytes
    assert torch.equal(unpack_symbols(packed, spec), stored.matrix)
    levels = {
        (r, c): tile_levels(packed["values"][r, c].tolist(), bits, 12)
        for r in range(packed["values"].shape[0])
        for c in range(packed["values"].shape[1])
    }
    expected = torch.tensor(
        [
            [levels[r // outputs, c // inputs][r % outputs * inputs + c % inputs] for c in range(columns)]
            for r in range(rows)
        ],
        dtype=torch.float64,
    )
    assert torch.equal(unpack(packed, spec, torch.float64), expected * packed["scales"].double())
    for narrow in (torch.float32, torch.bfloat16, torch.float16):  # rounded once, from the product in float32
        assert torch.equal(unpack(packed, spec, narrow), (expected.float() * packed["scales"].float()).to(narrow))


def test_the_state_moves_by_one_symbol() -> None:
    """state of t + 1 = (state of t >> K) | (the new symbol << (L − K)), around the whole tile."""
    bits, state, count = 3, 10, 64
    symbols = torch.randint(0, 8, (1, 1, count)).to(torch.uint8)
    spec = MatrixSpec(16, 4, bits=bits, trellis=Trellis(state, 4, 16))
    packed = pack(Stored(symbols, torch.ones(16, 1)), spec)
    found = unpack(packed, spec, torch.float64).reshape(-1).tolist()
    flat = symbols.reshape(-1).tolist()
    assert found == [
        level(sum(flat[(t + j) % count] << bits * j for j in range(-(-state // bits))) % 2**state) for t in range(count)
    ]


def test_large_matrices_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MatrixSpec(70, 50, bits=2, trellis=Trellis(16, 4, 16))
    packed = pack(random_symbols(spec, 5, torch.Generator().manual_seed(0), torch.bfloat16), spec)
    whole = unpack(packed, spec)
    monkeypatch.setattr("cospadi.format.trellis._AT_ONCE", {})
    monkeypatch.setattr("cospadi.format.trellis._AT_ONCE", {"cpu": 1})
    assert torch.equal(unpack(packed, spec), whole)


def test_what_does_not_fit_is_refused() -> None:
    spec = MatrixSpec(20, 9, bits=2, trellis=Trellis(8, 4, 16))
    good, scales = torch.zeros(2, 3, 64, dtype=torch.uint8), torch.ones(20, 1)
    pack(Stored(good, scales), spec)
    for stored, message in (
        (Stored(good[:1], scales), "the spec says torch.uint8"),
        (Stored(good.int(), scales), "the spec says torch.uint8"),
        (Stored(good), "need scales"),
        (Stored(good, scales[:, 0]), "need scales"),
        (Stored(good + 4, scales), "larger than 2 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(stored, spec)
    with pytest.raises(ValueError, match="no trellis"):
        unpack_symbols({}, MatrixSpec(4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": 17}, "17 state bits is not known"),
        ({"state": 0}, "0 state bits"),
        ({"inputs": 3}, "not known"),
        ({"outputs": 8}, "not known"),
        ({"outputs": 512}, "not known"),
        ({"inputs": -4, "outputs": -16}, "not known"),
        ({"state": True}, "whole number"),
        ({"inputs": 4.0}, "whole number"),
    ],
)
def test_unknown_codes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trellis(**{"state": 12, "inputs": 4, "outputs": 16} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 8}, "with a trellis"),
        ({"bits": 5}, "with a trellis"),
        ({"bits": 2, "group": 4}, "one scale per row"),
        ({"bits": 2, "pattern": "2:4"}, "dense"),
        ({"bits": 2, "symmetric": False}, "zero points"),
        ({"bits": 2, "half": True}, "half steps"),
        ({"bits": 4, "trellis": Trellis(3, 4, 16)}, "3 state bits cannot hold 4"),
        ({"bits": 1, "trellis": None}, "bits must be one of"),
        ({"bits": 16, "trellis": None, "half": True}, "half steps are for integers"),
    ],
)
def test_impossible_matrices(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixSpec(8, 8, **{"trellis": Trellis(12, 4, 16)} | arguments)


@pytest.mark.parametrize("d_out", [(37, 20, 5), (32, 16, 5), (7,)])
def test_every_module_has_tiles_of_its_own(d_out: tuple[int, ...]) -> None:
    codes = MatrixSpec(sum(d_out), 30, bits=3, trellis=Trellis(12, 4, 16))
    names = tuple(f"m{i}" for i in range(len(d_out)))
    spec = GroupSpec(names, 30, d_out, codes)
    tiles = spec.lengths("values")
    assert tiles == [-(-size // 16) for size in d_out]
    stored = random_symbols(codes, sum(tiles), torch.Generator().manual_seed(0), torch.bfloat16)
    packed = Factors(stored).pack(spec, torch.bfloat16)
    assert sum(t.numel() * t.element_size() for t in packed.values()) == spec.bytes
    assert stored.scales is not None
    first_tile, first_row = 0, 0
    for index, weight in enumerate(spec.rebuild(packed)):
        own = Stored(
            stored.matrix[first_tile : first_tile + tiles[index]], stored.scales[first_row : first_row + d_out[index]]
        )
        part = spec.module_codes(index)
        assert torch.equal(weight, unpack(pack(own, part), part, torch.float64).T)
        first_tile, first_row = first_tile + tiles[index], first_row + d_out[index]


def test_numbers_that_are_not_finite_are_seen() -> None:
    symbols = torch.zeros(1, 1, 64, dtype=torch.uint8)
    assert Factors(Stored(symbols, torch.ones(16, 1))).finite
    assert not Factors(Stored(symbols, torch.full((16, 1), torch.nan))).finite


def test_version_is_the_least_that_can_describe_it() -> None:
    plain = MatrixSpec(16, 8, bits=4)
    assert GroupSpec(("a",), 8, (16,), plain).version == 1
    assert GroupSpec(("a",), 8, (16,), plain, rotation=Rotation()).version == 2
    for codes in (MatrixSpec(16, 8, bits=4, half=True), MatrixSpec(16, 8, bits=4, trellis=Trellis(12, 4, 16))):
        assert GroupSpec(("a",), 8, (16,), codes).version == 2
    halves = MatrixSpec(16, 8, bits=4, half=True)
    assert GroupSpec(("a",), 8, (5,), MatrixSpec(5, 16), halves).version == 2
