import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from cospadi.checkpoint.headers import read_directory, read_header, read_json
from cospadi.errors import CheckpointError


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.zeros(7, dtype=torch.int8),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "words": torch.zeros(2, 2, dtype=torch.int32),
        "scalar": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {n: (e.shape, e.dtype, e.bytes) for n, e in found.items()} == {
        n: (tuple(t.shape), t.dtype, t.numel() * t.element_size()) for n, t in tensors.items()
    }


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "cannot be read"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "duplicate key"),
        (b"[" * 100_000, b"", "cannot be read"),
        (b"\xff\xfe{}", b"", "cannot be read"),
        ({"a": entry()}, bytes(7), "7|promises"),
        ({"a": entry()}, bytes(9), "promises"),
        ({"a": entry(shape=(3,))}, bytes(8), "tensor a.*does not fit"),
        ({"a": entry(shape=(-1, -2))}, bytes(8), "tensor a"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "tensor a"),
        ({"a": entry(dtype="X9")}, bytes(8), "tensor a.*X9"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "tensor a"),
        ({"a": entry(offsets=(8, 16))}, bytes(16), "tensor a starts at byte 8"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "tensor b starts at byte 4"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "tensor a"),
        ({"a": entry(offsets=(0, 8, 9))}, bytes(8), "tensor a"),
        ({"a": {"dtype": "F32"}}, b"", "tensor a"),
        ({"a": None}, b"", "tensor a"),
    ],
)
def test_damaged_header(tmp_path, header, data, message):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 99) + b"{}", struct.pack("<Q", 2**63) + b"{}"])
def test_short_file(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors.*truncated"):
        read_header(tmp_path / "x.safetensors")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"d\.safetensors"):
        read_header(tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_json(tmp_path / "x.json")


@pytest.fixture
def sharded(tmp_path):
    directory = tmp_path / "d"
    directory.mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, directory / "m1.safetensors")
    save_file({"c": torch.ones(4)}, directory / "m2.safetensors")
    save_file({"secret": torch.ones(4)}, tmp_path / "outside.safetensors")
    return directory


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


GOOD = {"a": "m1.safetensors", "b": "m1.safetensors", "c": "m2.safetensors"}


def test_index(sharded):
    index(sharded, GOOD)
    assert {n: e.file.name for n, e in read_directory(sharded).items()} == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secret": "../outside.safetensors"}, r"secret is in '\.\./outside"),
        ({"secret": "/etc/passwd"}, "not a file name in this directory"),
        ({"secret": "sub\\m1.safetensors"}, "not a file name in this directory"),
        ({"secret": ".."}, "not a file name in this directory"),
        ({"secret": ""}, "not a file name in this directory"),
        ({"secret": 3}, "not a file name in this directory"),
        ({"d": "m2.safetensors"}, "m2.safetensors: tensor d is missing"),
        ({"c": "m1.safetensors"}, "tensor c is missing"),
        ({"d": "m3.safetensors"}, "m3.safetensors: the file is missing"),
        ({"c": None}, "not a file name"),
    ],
)
def test_damaged_index(sharded, change, message):
    index(sharded, GOOD | change)
    with pytest.raises(CheckpointError, match=message):
        read_directory(sharded)


def test_tensor_that_the_index_does_not_know(sharded):
    index(sharded, {"a": "m1.safetensors", "c": "m2.safetensors"})
    with pytest.raises(CheckpointError, match=r"m1\.safetensors: holds tensor b"):
        read_directory(sharded)


def test_no_weights_and_no_map(sharded):
    with pytest.raises(CheckpointError, match="holds neither"):
        read_directory(sharded)
    index(sharded, {})
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_directory(sharded)
