"""The pieces of the journal, one by one; whole interrupted runs are in the integration tests."""

import json
from contextlib import nullcontext

import pytest
import torch

from cospadi.engine.journal import (
    Journal,
    check_output,
    differences,
    held,
)
from cospadi.errors import NumericalError, OutputError, ResourceError
from cospadi.report.write import report_json


def test_differences_are_named_with_old_and_new():
    before = {"a": 1, "b": {"c": "x", "d": None}, "gone": 2, "sha": "0" * 64}
    now = {"a": 1, "b": {"c": "y", "d": 4}, "new": [1], "sha": "1" * 64}
    found = differences(before, now)
    assert found[:4] == ["b.c: x → y", "b.d: unset → 4", "gone: 2 → unset", "new: unset → [1]"]
    assert found[4].startswith("sha: 0000000000…") and len(found[4]) < 50
    assert differences(before, before) == []


def test_groups_come_back_as_they_were(tmp_path):
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "codes.values": torch.randn(5, 3, generator=generator).bfloat16().T,  # not contiguous
        "codes.mask": torch.randint(-9, 9, (4, 1), generator=generator, dtype=torch.int32),
    }
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        assert not journal.groups.has(3)
        journal.groups.write(3, tensors, {"error": 0.25, "seconds": 1e-3})
        assert journal.groups.has(3) and not journal.groups.has(2)
        found, info = journal.groups.read(3)
    assert info == {"error": 0.25, "seconds": 1e-3}
    assert found.keys() == tensors.keys()
    for name in tensors:
        assert found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name])


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"rubbish" * 9])
def test_damaged_groups_are_named(tmp_path, content):
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        journal.groups.write(0, {"codes.values": torch.zeros(2)}, {})
        path = next((tmp_path / "out/.cospadi/groups").iterdir())
        path.write_bytes(content)
        with pytest.raises(OutputError, match=r"0000\.safetensors.*delete"):
            journal.groups.read(0)


def test_the_directory_is_held_by_one_run(tmp_path):
    with Journal(tmp_path, {"a": 1}):
        with pytest.raises(OutputError, match="another run is working"):
            Journal(tmp_path, {"a": 1})
        with pytest.raises(OutputError, match="another run is working"):
            Journal(tmp_path, {"a": 1}, fresh=True)
    Journal(tmp_path, {"a": 1}).close()


def test_a_refused_run_lets_go_of_the_directory(tmp_path):
    with Journal(tmp_path, {"a": 1}) as journal:
        journal.groups.write(0, {"x": torch.zeros(1)}, {})
    for _ in range(2):
        with pytest.raises(OutputError, match=r"unfinished.*a: 1 → 2.*--fresh"):
            Journal(tmp_path, {"a": 2})
    with Journal(tmp_path, {"a": 1}) as journal:
        assert journal.groups.has(0)


def test_fresh_forgets_the_run_and_nothing_else(tmp_path):
    with Journal(tmp_path, {"a": 1}) as journal:
        journal.groups.write(0, {"x": torch.zeros(1)}, {})
        journal.statistics.mkdir()
        (journal.folder / "plan.json").write_text("{}")
    ours = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    theirs = ["model.safetensors.bak", "model-best.safetensors", "mymodel.safetensors", "notes.md", "data/model.txt"]
    (tmp_path / "data").mkdir()
    for name in [*ours, *theirs, "report.json"]:
        (tmp_path / name).write_text("{}")
    with Journal(tmp_path, {"a": 2}, fresh=True) as journal:
        assert not journal.groups.has(0) and journal.report() is None
        assert not journal.statistics.exists() and not (journal.folder / "plan.json").exists()
        assert json.loads((journal.folder / "fingerprint.json").read_text()) == {"a": 2}
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name).exists() for name in theirs)


@pytest.mark.parametrize(
    ("error", "groups", "stays"),
    [
        (NumericalError("NaN"), 0, False),
        (NumericalError("NaN"), 1, True),
        (ResourceError("memory"), 0, True),
        (OutputError("full"), 0, True),
        (KeyboardInterrupt(), 0, True),
    ],
)
def test_only_a_hopeless_run_cleans_up(tmp_path, error, groups, stays):
    out = tmp_path / "a/b"
    with pytest.raises(type(error)), Journal(out, {"a": 1}) as journal:
        for index in range(groups):
            journal.groups.write(index, {"x": torch.zeros(1)}, {})
        raise error
    assert out.exists() == stays and (tmp_path / "a").exists() == stays


def test_output_directories(tmp_path):
    check_output(tmp_path / "a/b/c")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(OutputError, match="file is a file"):
        check_output(tmp_path / "file/a/b")
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path)
    (tmp_path / ".cospadi").mkdir()
    check_output(tmp_path)
    (tmp_path / ".cospadi").rmdir()
    for name, content in (("report.json", '{"cospadi_version": "0.1.0", '), ("rows.jsonl", '{"fingerprint": "0", ')):
        (tmp_path / name).write_text(content)
        check_output(tmp_path, comparison=name == "rows.jsonl")
        (tmp_path / name).write_text("{}")
        with pytest.raises(OutputError, match="not empty"):
            check_output(tmp_path)
        (tmp_path / name).unlink()


def test_a_finished_run_without_its_report_is_made_again(tmp_path):
    for name in ("recipe.yaml", "SHA256SUMS", "config.json", "model.safetensors"):
        with pytest.raises(OutputError, match="not empty") if name == "SHA256SUMS" else nullcontext():
            check_output(tmp_path)
        (tmp_path / name).write_text("{}")
    with Journal(tmp_path, {"a": 1}) as journal:
        assert journal.report() is None


def finished(out, **fingerprint):
    """A run that is done: its report is all that says so."""
    with Journal(out, fingerprint) as journal:
        (out / "report.json").write_text(json.dumps({"cospadi_version": "1", "fingerprint": journal.record}))
        journal.finish()


def test_a_finished_run_is_known_by_its_report(tmp_path):
    finished(tmp_path, a={"b": 1.5, "c": None})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with Journal(tmp_path, {"a": {"b": 1.5, "c": None}}) as journal:
        assert journal.report() is not None
        with pytest.raises(OutputError, match="another run is working"):
            Journal(tmp_path, {"a": {"b": 1.5, "c": None}})
        journal.finish()
    for _ in range(2):
        with pytest.raises(OutputError, match=r"a finished run with other settings \(a\.b: 1\.5 → 2\): .*--fresh"):
            Journal(tmp_path, {"a": {"b": 2, "c": None}})
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with Journal(tmp_path, {"a": 2}, fresh=True) as journal:
        assert journal.report() is None


def test_paths_in_a_report_may_be_shortened(tmp_path):
    finished(tmp_path, where="/a/long/path", other=1)
    (tmp_path / "report.json").write_text(report_json(json.loads((tmp_path / "report.json").read_text())))
    assert "long" not in (tmp_path / "report.json").read_text()
    with Journal(tmp_path, {"where": "/a/long/path", "other": 1}) as journal:
        journal.finish()
    with pytest.raises(OutputError, match="finished run with other settings"):
        Journal(tmp_path, {"where": "/another/path", "other": 1})


def test_a_finished_run_of_an_earlier_version_is_known_by_its_folder(tmp_path):
    (tmp_path / ".cospadi").mkdir()
    (tmp_path / ".cospadi/fingerprint.json").write_text('{"a": 1}')
    (tmp_path / ".cospadi/lock").touch()
    (tmp_path / "report.json").write_text('{"cospadi_version": "0.1.0", "model": "ä"}')
    with pytest.raises(OutputError, match=r"a: 1 → 2"):
        Journal(tmp_path, {"a": 2})
    for _ in range(2):
        with Journal(tmp_path, {"a": 1}) as journal:
            journal.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["model"] == "ä"


def test_a_report_that_does_not_say_what_the_run_was(tmp_path):
    (tmp_path / "report.json").write_text('{"cospadi_version": "0.1.0"}')
    with pytest.raises(OutputError, match=r"its report does not say which\): .*--fresh"):
        Journal(tmp_path, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    Journal(tmp_path, {"a": 1}, fresh=True).close()


def test_a_lock_whose_file_is_gone_holds_nothing(tmp_path):
    first = held(tmp_path)
    assert held(tmp_path) is None
    (tmp_path / ".cospadi/lock").unlink()  # as a run that finishes does
    second = held(tmp_path)
    assert first is not None and second is not None and held(tmp_path) is None
    first.close()
    assert held(tmp_path) is None
    second.close()
