import json
import os
from types import SimpleNamespace

import pytest
import torch

from cospadi.calibration import Statistics, StatisticsStore
from cospadi.calibration.store import pack_symmetric, packed_size, unpack_symmetric
from cospadi.errors import OutputError
from cospadi.model_view import LinearGroup

FINGERPRINT = {"tokens": "abc", "model": {"name": "m", "shape": (3, 4)}}


def random_statistics(size, seed=0):
    x = torch.randn(size + 3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x.T @ x
    return Statistics((gram + gram.T) / 2, x.abs().sum(0), size + 3)


GROUPS = (LinearGroup(("m.0.q", "m.0.k"), 0, 37, (5, 6)), LinearGroup(("m.0.o",), 0, 21, (9,)))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_symmetric_packing_is_exact_and_saves_space(size):
    gram = random_statistics(size).gram
    packed = pack_symmetric(gram)
    assert packed.numel() == packed_size(size)
    assert torch.equal(unpack_symmetric(packed, size), gram)
    if size == 700:
        assert packed.numel() < 0.72 * size**2
    with pytest.raises(ValueError, match="holds"):
        unpack_symmetric(packed[:-1], size)


def test_statistics_come_back_bit_by_bit(tmp_path):
    store = StatisticsStore(tmp_path / "deep" / "er", FINGERPRINT)
    assert 0 not in store
    saved = {group: random_statistics(group.d_in, seed=i) for i, group in enumerate(GROUPS)}
    store.save(0, saved)
    again = StatisticsStore(tmp_path / "deep" / "er", FINGERPRINT)
    assert 0 in again and 1 not in again
    for group, item in saved.items():
        loaded = again.load(group)
        assert torch.equal(loaded.gram, item.gram) and torch.equal(loaded.abs_sum, item.abs_sum)
        assert loaded.tokens == item.tokens
    again.discard(0)
    assert 0 not in again
    again.discard(0)


def test_another_fingerprint_is_refused_and_named(tmp_path):
    StatisticsStore(tmp_path, FINGERPRINT)
    with pytest.raises(OutputError, match=r'tokens: "abc" there, "xyz" now') as caught:
        StatisticsStore(tmp_path, FINGERPRINT | {"tokens": "xyz"})
    assert "model" not in str(caught.value).split("(")[1] and "--fresh" in str(caught.value)
    with pytest.raises(OutputError, match="extra: null there, 1 now"):
        StatisticsStore(tmp_path, FINGERPRINT | {"extra": 1})
    with pytest.raises(OutputError, match="extra"):
        StatisticsStore(tmp_path, FINGERPRINT | {"extra": None})
    with pytest.raises(OutputError, match="model"):
        StatisticsStore(tmp_path, {"tokens": "abc"})


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_damaged_fingerprint_is_refused(tmp_path, content):
    (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(OutputError):
        StatisticsStore(tmp_path, FINGERPRINT)


def test_unfinished_files_are_swept_and_never_read(tmp_path):
    StatisticsStore(tmp_path, FINGERPRINT)
    (tmp_path / "layer-00000.safetensors.part").write_bytes(b"half")
    store = StatisticsStore(tmp_path, FINGERPRINT)
    assert 0 not in store and not list(tmp_path.glob("*.part"))


def test_a_crash_while_writing_leaves_nothing(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path, FINGERPRINT)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="no space left"):
        store.save(0, {GROUPS[0]: random_statistics(37)})
    assert 0 not in store and sorted(p.name for p in tmp_path.iterdir()) == ["fingerprint.json"]


def test_missing_and_damaged_layers(tmp_path):
    store = StatisticsStore(tmp_path, FINGERPRINT)
    with pytest.raises(OutputError, match="no statistics of decoder layer 0"):
        store.load(GROUPS[0])
    store.save(0, {GROUPS[0]: random_statistics(37)})
    with pytest.raises(OutputError, match="damaged"):
        store.load(GROUPS[1])
    with pytest.raises(OutputError, match="damaged"):
        store.load(LinearGroup(("m.0.q",), 0, 36, (5,)))
    path = tmp_path / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OutputError, match="layer-00000"):
        store.load(GROUPS[0])


def test_space_is_looked_at_beforehand(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path, FINGERPRINT)
    store.require_space(GROUPS)
    with pytest.raises(OutputError, match=r"need 40010\.\d GB"):
        store.require_space([LinearGroup(("m",), 0, 10**6, (1,))] * 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2048))
    with pytest.raises(OutputError, match=r"need [1-9]\d+ kB, 2 kB are free: free some"):
        store.require_space([LinearGroup(("m",), 0, 100, (1,))])


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="cannot be written: "):
        StatisticsStore(tmp_path / "x", FINGERPRINT)


def test_fingerprint_is_plain_json(tmp_path):
    StatisticsStore(tmp_path, FINGERPRINT)
    assert json.loads((tmp_path / "fingerprint.json").read_text())["model"]["shape"] == [3, 4]
