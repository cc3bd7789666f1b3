"""Checkpoints of shared atoms written by every version so far load and mean what they meant."""

import json
from pathlib import Path

import pytest
import torch

from checkpoints.make_stored_masa import meaning
from cospadi.checkpoint import load, read_config, save, validate

STORED = sorted((Path(__file__).parents[2] / "checkpoints").glob("masa_v*"))


def test_they_are_there():
    assert [path.name for path in STORED] == ["masa_v1"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_loads_as_it_was(path, tmp_path):
    expected = json.loads((path / "expected.json").read_text())
    specs = validate(path)
    assert [spec.to_dict() for spec in specs] == expected["groups"]
    model = load(path)
    found = meaning(model)
    assert list(found["layers"]) == list(expected["layers"])
    for name, product in expected["layers"].items():
        torch.testing.assert_close(torch.tensor(found["layers"][name]), torch.tensor(product), rtol=1e-6, atol=1e-7)
    # 16-bit arithmetic may round differently on another machine
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), rtol=0.02, atol=0.02)
    save(model, None, tmp_path, read_config(path))
    assert meaning(load(tmp_path)) == found
