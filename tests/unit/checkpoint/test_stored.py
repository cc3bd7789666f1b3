"""Checkpoints written by every version so far load and mean what they meant."""

import json
from pathlib import Path

import pytest
import torch

from checkpoints.make_stored import meaning
from cospadi import evaluation
from cospadi.checkpoint import export_dense, factor_bytes, load, read_config, save, validate
from cospadi.checkpoint.checks import FileTensors
from cospadi.checkpoint.headers import read_directory
from cospadi.errors import CheckpointError

ROOT = Path(__file__).parents[2] / "checkpoints"
STORED = sorted(path.parent for path in ROOT.glob("v*/*/config.json"))


def test_they_are_there():
    expected = {f"{version}/{name}" for version in ("v1", "v2") for name in ("every_kind", "tied_float16")}
    assert {path.relative_to(ROOT).as_posix() for path in STORED} >= expected


@pytest.mark.parametrize("name", ["every_kind", "tied_float16"])
def test_what_version_1_can_say_is_written_as_before(name, tmp_path):
    """The description and every byte of the stored tensors."""
    path = ROOT / "v1" / name
    save(load(path), None, tmp_path, read_config(path), max_shard_size="1GB")
    old, new = (json.loads((p / "config.json").read_text())["quantization_config"] for p in (path, tmp_path))
    assert json.dumps(new) == json.dumps(old) and new["format_version"] == 1
    before, after = read_directory(path), read_directory(tmp_path)
    assert before.keys() == after.keys()
    for full in before:
        module, _, leaf = full.rpartition(".")
        a, b = (FileTensors(entries, module)[leaf] for entries in (before, after))
        assert a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_loads_as_it_was(path, tmp_path):
    expected = json.loads((path / "expected.json").read_text())
    groups = validate(path)
    assert [group.to_dict() for group in groups] == expected["groups"]
    assert factor_bytes(path) == sum(group.bytes for group in groups)
    model = load(path)
    found = meaning(model)
    assert list(found["layers"]) == list(expected["layers"])
    for name, layer in expected["layers"].items():
        got = found["layers"][name]
        assert {k: got[k] for k in got if k != "product"} == {k: layer[k] for k in layer if k != "product"}, name
        torch.testing.assert_close(torch.tensor(got["product"]), torch.tensor(layer["product"]), rtol=1e-5, atol=1e-6)
    # 16-bit arithmetic may round differently on another machine
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), rtol=0.02, atol=0.02)
    save(model, None, tmp_path, read_config(path))
    assert meaning(load(tmp_path))["layers"] == found["layers"]


EVERY = sorted(path.parent for path in ROOT.glob("*_v1/**/config.json")) + STORED


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_format_is_inspected_and_exported(path, tmp_path):
    seen = evaluation.inspect(path)
    rows = seen["groups"]
    assert rows and sum(row["bytes"] for row in rows) <= factor_bytes(path) <= evaluation.inspect(path)["file_bytes"]
    assert all({"name", "modules", "method", "bytes", "bytes_before", "error"} <= set(row) for row in rows)
    if path.parent.name == "width_v1":
        assert seen["bytes_before"] is None
        with pytest.raises(CheckpointError, match="width-pruned and has no stock form"):
            export_dense(path, tmp_path / "dense")
        return
    assert seen["bytes_after"] == factor_bytes(path) and seen["keep_actual"] > 0
    export_dense(path, tmp_path / "dense")
    stock = load(tmp_path / "dense")
    assert not hasattr(stock.config, "quantization_config")
    with torch.no_grad():
        ids = torch.arange(12)[None]
        torch.testing.assert_close(stock(ids).logits, load(path)(ids).logits, rtol=0.05, atol=0.1)
        assert torch.equal(stock(ids).logits, load(path, compose=True)(ids).logits)
