"""Rotations: the stored form, the transform of inputs, and the weight that stands for both."""

import pytest
import torch

from checkpoints.factory import make_spec, random_factors, random_rotation
from cospadi.format import GroupSpec, MatrixSpec, Rotation, Stored, StoredRotation, split_packed, unpack
from cospadi.format.group import Factors, part_of
from cospadi.format.hadamard import hadamard
from cospadi.format.rotation import folded, rotated


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize(("d_in", "block"), [(37, 16), (128, 128), (84, 64), (1, 2), (32, 1024)])
def test_pack_and_transform(d_in: int, block: int, scales: bool) -> None:
    spec = Rotation(block, scales)
    stored = random_rotation(spec, d_in, torch.Generator().manual_seed(d_in), torch.bfloat16)
    packed = stored.pack(spec, d_in, torch.bfloat16)
    assert {role: (tuple(t.shape), t.dtype) for role, t in packed.items()} == spec.tensors(d_in)
    assert sum(t.numel() * t.element_size() for t in packed.values()) == spec.bytes(d_in)
    bits = [packed["signs"][i // 32].item() >> (i % 32) & 1 for i in range(d_in)]
    assert bits == [int(sign < 0) for sign in stored.signs]
    factors = stored.signs.double() * (stored.scales.double() if stored.scales is not None else 1.0)
    x = torch.randn(3, d_in, dtype=torch.float64)
    torch.testing.assert_close(rotated(x, packed, spec), hadamard(x * factors, block))
    matrix = torch.diag(factors) @ hadamard(torch.eye(d_in, dtype=torch.float64), block)  # T
    rows = torch.randn(5, d_in, dtype=torch.float64)
    torch.testing.assert_close(folded(rows, packed, spec), rows @ matrix.T)
    torch.testing.assert_close(x @ folded(rows, packed, spec).T, rotated(x, packed, spec) @ rows.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_float32_and_cast_back(dtype: torch.dtype) -> None:
    spec = Rotation(64)
    packed = random_rotation(spec, 84, torch.Generator().manual_seed(0), dtype).pack(spec, 84, dtype)
    x = torch.randn(4, 84).to(dtype)
    assert torch.equal(rotated(x, packed, spec), rotated(x.float(), packed, spec).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["trellis2", "halves3"])
def test_the_weight_of_a_group_includes_it(kind: str, dtype: torch.dtype) -> None:
    spec = make_spec(kind, ["a", "b"], 37, (13, 7), atoms=20)
    packed = random_factors(spec, 1, dtype).pack(spec, dtype)
    assert sum(t.numel() * t.element_size() for t in packed.values()) == spec.bytes
    bare = GroupSpec(spec.modules, spec.d_in, spec.d_out, spec.codes, spec.dictionary)
    unrotated = bare.weight({key: t for key, t in packed.items() if not key.startswith("rotation")})
    assert spec.rotation is not None
    x = torch.randn(6, 37, dtype=torch.float64)
    z = rotated(x, part_of(packed, "rotation"), spec.rotation)
    torch.testing.assert_close(x @ spec.weight(packed), z @ unrotated)
    torch.testing.assert_close(torch.cat(spec.rebuild(packed), 1), spec.weight(packed))
    dictionary, _ = split_packed(packed)
    assert (dictionary is None) == (spec.dictionary is None)
    if dictionary is not None and spec.dictionary is not None:
        assert unpack(dictionary, spec.dictionary).shape == (20, 37)


def test_what_does_not_fit_is_refused() -> None:
    spec = Rotation(16)
    signs, scales = torch.ones(20), torch.ones(20)
    for stored, other, message in (
        (StoredRotation(signs[:19], scales), spec, "as many signs"),
        (StoredRotation(signs * 0, scales), spec, "signs of ±1"),
        (StoredRotation(signs), spec, "lacks scales"),
        (StoredRotation(signs, scales), Rotation(16, False), "has scales"),
        (StoredRotation(signs, scales[:3]), spec, "as many scales"),
    ):
        with pytest.raises(ValueError, match=message):
            stored.pack(other, 20, torch.bfloat16)
    group = GroupSpec(("a",), 20, (3,), MatrixSpec(3, 20), rotation=spec)
    with pytest.raises(ValueError, match="both have a rotation"):
        Factors(Stored(torch.zeros(3, 20))).pack(group, torch.bfloat16)


@pytest.mark.parametrize(
    "data",
    [
        None,
        16,
        {},
        {"scales": True},
        {"block": 48},
        {"block": 1},
        {"block": 2048},
        {"block": True},
        {"block": "16"},
        {"block": 16, "scales": 1},
        {"block": 16, "order": 2},
    ],
)
def test_unknown_rotations_are_refused(data: object) -> None:
    with pytest.raises(ValueError, match="rotation"):
        Rotation.from_dict(data)


def test_scales_that_are_not_finite_are_seen() -> None:
    codes = Stored(torch.zeros(3, 20))
    assert not Factors(codes, rotation=StoredRotation(torch.ones(20), torch.full((20,), torch.inf))).finite
    assert Factors(codes, rotation=StoredRotation(torch.ones(20))).finite
