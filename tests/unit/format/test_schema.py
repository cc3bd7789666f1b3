import json

import pytest
import torch

from checkpoints.factory import KINDS, make_spec
from cospadi.format import GroupSpec, MatrixSpec


@pytest.mark.parametrize("kind", KINDS)
def test_json_round_trip(kind):
    spec = make_spec(kind, ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"], 24, (13, 7))
    assert GroupSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_bytes_by_hand():
    # 10 rows, 70 columns, 2:4 keeps 35 (the last run of 2 keeps 1); mask: 3 words; int4: 18 bytes → 5 words; 5 scales
    spec = MatrixSpec(10, 70, "2:4", bits=4, group=8)
    assert (spec.nonzeros, spec.groups) == (35, 5)
    assert spec.bytes == 10 * (3 * 4 + 5 * 4 + 5 * 2)
    # with zero points: 5 of 4 bits in one more word
    assert MatrixSpec(10, 70, "2:4", bits=4, group=8, symmetric=False).bytes == spec.bytes + 10 * 4
    assert MatrixSpec(3, 5).bytes == 30
    assert MatrixSpec(3, 5, bits=8).bytes == 15 + 3 * 2
    assert MatrixSpec(1, 33, "free", 9, bits=14).bytes == 4 * 4 + 2 * 4
    group = GroupSpec(("a", "b"), 70, (4, 6), spec)
    assert group.bytes == spec.bytes and group.dense_bytes == 2 * 70 * 10 and group.atoms == 70


@pytest.mark.parametrize("kind", KINDS)
def test_group_bytes_are_those_of_its_modules(kind):
    spec = make_spec(kind, ["a", "b", "c"], 24, (13, 7, 1))
    parts = sum(spec.module_codes(i).bytes for i in range(3))
    parts += spec.rotation.bytes(24) if spec.rotation else 0
    assert spec.bytes == parts + (spec.dictionary.bytes if spec.dictionary else 0)


def test_float_dtype_of_tensors():
    for dtype in (torch.float16, torch.bfloat16):
        assert MatrixSpec(2, 4).tensors(dtype) == {"values": ((2, 4), dtype)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "cannot be stored"),
        ((4, 4, "dense", 3), "holds 4 values"),
        ((4, 4, "free", 5), "not possible"),
        ((4, 4, "free", 0), "not possible"),
        ((4, 8, "2:4", 3), "holds 4 values"),
        ((4, 8, "5:4"), "0 < n <= m"),
        ((4, 8, "2:5"), "one of"),
        ((4, 8, "some"), "neither"),
        ((4, 4, "dense", 0, 7), "bits"),
        ((4, 4, "dense", 0, 4, -1), "group"),
    ],
)
def test_impossible_matrices(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatrixSpec(*arguments)


def test_impossible_groups():
    codes, dictionary = MatrixSpec(5, 3, "free", 2), MatrixSpec(3, 8)
    GroupSpec(("a",), 8, (5,), codes, dictionary)
    for change, message in (
        ({"modules": ("a", "b")}, "2 modules"),
        ({"d_out": (6,)}, "rows"),
        ({"d_in": 9}, "inputs"),
        ({"dictionary": MatrixSpec(4, 8)}, "atoms"),
        ({"dictionary": None}, "atoms"),
    ):
        fields = {"modules": ("a",), "d_in": 8, "d_out": (5,), "codes": codes, "dictionary": dictionary} | change
        with pytest.raises(ValueError, match=message):
            GroupSpec(**fields)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("atoms"),
        lambda d: d.update(d_out=[5, 6]),
        lambda d: d.update(d_out=None),
        lambda d: d["codes"].update(level=3),
        lambda d: d["codes"].update(bits=7),
        lambda d: d.update(codes=None),
        lambda d: d.update(order="walsh"),
        lambda d: d.update(rotation=None),
        lambda d: d.update(rotation={"block": 48}),
        lambda d: d["codes"].update(trellis={"state": 12, "inputs": 4, "outputs": 16}),
        lambda d: d["dictionary"].update(trellis={"state": 12, "inputs": 4}),
        lambda d: d["dictionary"].update(trellis=None),
        lambda d: d["dictionary"].update(pattern="free", nonzeros=99),
    ],
)
def test_damaged_json_is_refused(damage):
    data = make_spec("word4", ["a"], 24, (5,)).to_dict()
    damage(data)
    with pytest.raises(ValueError):
        GroupSpec.from_dict(data)
