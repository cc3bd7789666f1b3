"""Checkpoints written by every version so far load and mean what they meant."""

import json
from pathlib import Path

import pytest
import torch

from checkpoints.make_stored import meaning
from cospadi.checkpoint import factor_bytes, load, read_config, save, validate

ROOT = Path(__file__).parents[2] / "checkpoints"
STORED = sorted(path.parent for path in ROOT.glob("v*/*/config.json"))


def test_they_are_there():
    assert {path.relative_to(ROOT).as_posix() for path in STORED} >= {"v1/every_kind", "v1/tied_float16"}


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
