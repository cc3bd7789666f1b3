"""Interruptions of every kind: the same command goes on where it stopped and ends with the same bytes.

Runs that are to be killed are real processes, forked from a server that has imported everything once.
"""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from command import command, snapshot, unchanged, weights
from tiny import save_tiny, tiny_text

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cospadi.engine", "cospadi.report", "cospadi.cli.app", "command"])


def child(
    arguments: list[str], log: str, kill_at: tuple[str, int] | None = None, file_limit: int | None = None
) -> None:
    """Run a command in a forked process.

    Args:
        arguments: of the command.
        log: file for its stderr.
        kill_at: ``(part of a file's name, n)``: the process kills itself just before the n-th such file, counted
            from 1, is moved to its place.
        file_limit: largest size of a file, in bytes, as if the disk were full beyond it.
    """
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # servers of multiprocessing ignore it
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if kill_at is not None:
        _kill_before_move(*kill_at)
    begun = time.perf_counter()
    done = command(*arguments)
    Path(log).write_text(done.err, encoding="utf-8")
    Path(log + ".seconds").write_text(str(time.perf_counter() - begun))
    os._exit(done.code)


def _kill_before_move(part: str, count: int) -> None:
    real = os.replace
    seen = 0

    def replace(source: str, target: str, **options: object) -> None:
        nonlocal seen
        seen += part in str(target)
        if part in str(target) and seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **options)

    os.replace = replace
    # os.rename and Path.replace end in the same place: patch what the package calls
    Path.replace = lambda self, target: replace(str(self), str(target)) or Path(target)  # type: ignore[method-assign]


def start(arguments: list[str], log: Path, **options: object) -> BaseProcess:
    process = PROCESSES.Process(target=child, args=(arguments, str(log)), kwargs=options)
    process.start()
    return process


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text, and the result of a run that nobody disturbed, with the seconds it took."""
    folder = tmp_path_factory.mktemp("journal")
    save_tiny(folder / "tiny", "qwen2", num_hidden_layers=2)
    (folder / "text.txt").write_text(tiny_text(6000), encoding="utf-8")
    recipe = {
        "method": "pursuit",
        "keep": 0.75,
        "options": {"rounds": 3},
        "calibration": {"source": str(folder / "text.txt"), "samples": 8, "seq_len": 32},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    process = start(line(folder, folder / "whole"), folder / "log")
    process.join(120)
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder


def line(place: Path, out: Path, *more: str) -> list[str]:
    return ["compress", str(place / "tiny"), str(out), "--recipe", str(place / "r.yaml"), *more]


def finish(place: Path, out: Path) -> str:
    """Run the command until it is done, and check the result against the undisturbed one; returns stderr."""
    done = command(*line(place, out))
    assert done.code == 0, done.err
    assert weights(out) == weights(place / "whole")
    same = ("config.json", "recipe.yaml", "tokenizer.json")
    assert [snapshot(out)[name] for name in same] == [snapshot(place / "whole")[name] for name in same]
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (out, place / "whole"))
    for key in ("bytes_after", "keep_actual", "file_bytes", "calibration", "recipe", "model"):
        assert ours[key] == theirs[key], key
    assert [g["error"] for g in ours["groups"]] == [g["error"] for g in theirs["groups"]]
    assert (out / "report.html").is_file() and (out / "README.md").is_file()
    assert not (out / ".cospadi").exists()
    return done.err


def test_killed_at_random_moments(place, tmp_path):
    seconds = float((place / "log.seconds").read_text())
    random.seed(11)
    for number in range(3):
        out = tmp_path / f"out{number}"
        for _ in range(2):
            process = start(line(place, out), tmp_path / "log")
            time.sleep(random.uniform(0.05, 1.0) * seconds)
            process.kill()
            process.join(60)
            assert process.exitcode in (-signal.SIGKILL, 0)
        finish(place, out)
        assert weights(out) == weights(place / "whole")


# Every file that a run moves to its place, in order, and a few of many.
MOMENTS = [
    ("fingerprint.json", 1),
    ("layer-00000", 1),
    ("layer-00001", 1),
    ("0000.safetensors", 1),
    ("0005.safetensors", 1),
    ("0007.safetensors", 1),
    ("model.safetensors", 1),
    ("tokenizer.json", 1),
    ("config.json", 2),  # after generation_config.json and tokenizer_config.json, whatever their order
    ("config.json", 3),
    ("recipe.yaml", 1),
    ("report.json", 1),
    ("report.json", 2),  # the pages begin
    ("report.html", 1),
    ("README.md", 1),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]}-{moment[1]}")
def test_killed_just_before_a_file_is_in_place(place, tmp_path, moment):
    out = tmp_path / "out"
    process = start(line(place, out), tmp_path / "log", kill_at=moment)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, "the moment never came"
    groups = len(list((out / ".cospadi/groups").glob("*.safetensors")))
    err = finish(place, out)
    if (out / ".cospadi").is_dir() and groups and moment[0] != "report.html":
        assert f"{groups} of 8 groups were already finished" in err or "already complete" in err


def test_killed_again_and_again_until_it_is_done(place, tmp_path):
    random.seed(3)
    out, kills = tmp_path / "out", 0
    while True:
        process = start(line(place, out), tmp_path / "log", kill_at=("", random.randint(2, 9)))
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert kills < 40
    assert kills >= 3
    finish(place, out)


def test_killed_while_an_earlier_run_is_replaced(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "whole", out)
    other = line(place, out, "--seed", "9", "--fresh")
    process = start(other, tmp_path / "log", kill_at=("fingerprint.json", 1))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "config.json").exists(), "neither the old nor the new run is there: nothing may look finished"
    done = command(*line(place, out, "--seed", "9"))
    assert done.code == 0, done.err
    assert weights(out) != weights(place / "whole")


def test_interrupted_by_the_user(place, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(line(place, out), log)
    deadline = time.monotonic() + 60
    while not (out / ".cospadi/fingerprint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert log.read_text().splitlines()[-1] == "Error: interrupted; run the same command again to resume"
    finish(place, out)


def test_interrupted_in_a_process_of_its_own(place, tmp_path):
    """The same with the real program: nothing between the signal and our message prints a traceback."""
    out = tmp_path / "out"
    flags = ["--set", "rounds=100000"]
    run = [sys.executable, "-m", "cospadi", *line(place, out, *flags)]
    # a shell has what it runs in the background ignore the signal, and children inherit that
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not (out / ".cospadi/fingerprint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("Error: interrupted")


def test_two_runs_in_one_directory(place, tmp_path):
    out = tmp_path / "out"
    first = start(line(place, out, "--set", "rounds=100000"), tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (out / ".cospadi/fingerprint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    for flags in ([], ["--fresh"]):
        done = command(*line(place, out, *flags))
        assert done.code == 1 and "another run is working" in done.error
    assert first.is_alive()
    first.kill()
    first.join(60)
    assert command(*line(place, out, "--fresh")).code == 0
    assert weights(out) == weights(place / "whole")


@pytest.fixture
def half(place, tmp_path):
    """A run that was killed half-way."""
    out = tmp_path / "half"
    process = start(line(place, out), tmp_path / "log", kill_at=("0004.safetensors", 1))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    return out


def test_an_unfinished_run_is_not_continued_with_other_settings(place, half, tmp_path):
    save_tiny(tmp_path / "tiny", "qwen2", num_hidden_layers=2, seed=4)
    (tmp_path / "text.txt").write_text(tiny_text(6000, seed=8), encoding="utf-8")
    changes = [
        (["--keep", "0.7"], "recipe.keep: 0.75 → 0.7"),
        (["--method", "svd"], "recipe.method: pursuit → svd"),
        (["--seed", "1"], "recipe.seed: 0 → 1"),
        (["--samples", "7"], "recipe.calibration.samples: 8 → 7"),
        (["--set", "rounds=4"], "recipe.options.rounds: 3 → 4"),
        (["--calibration", str(tmp_path / "text.txt")], "text.tokens_sha256"),
    ]
    with unchanged(half):
        for flags, what in changes:
            done = command(*line(place, half, *flags))
            assert done.code == 1 and what in done.error and "--fresh" in done.error and "unfinished" in done.error
        done = command("compress", tmp_path / "tiny", half, "--recipe", place / "r.yaml")
        assert done.code == 1 and "model.sha256" in done.error and "--fresh" in done.error
    assert "4 of 8 groups were already finished" in finish(place, half)


def test_the_model_may_have_moved(place, half, tmp_path):
    """What counts is the content: the same model and text elsewhere continue the run."""
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    shutil.copy(place / "text.txt", tmp_path / "copy.txt")
    flags = ["--recipe", place / "r.yaml", "--calibration", tmp_path / "copy.txt"]
    done = command("compress", tmp_path / "tiny", half, *flags)
    assert done.code == 0 and "4 of 8 groups were already finished" in done.err
    assert weights(half) == weights(place / "whole")


def test_altered_files_of_the_journal_are_noticed(place, half):
    group = half / ".cospadi/groups/0002.safetensors"
    data = group.read_bytes()
    group.write_bytes(data[:-5])
    done = command(*line(place, half))
    assert done.code == 1 and "0002.safetensors" in done.error and "delete" in done.error
    group.unlink()
    finish(place, half)


@pytest.mark.parametrize("name", [".cospadi/fingerprint.json", "report.json"])
def test_altered_records_are_noticed(place, half, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(place / "whole" if name == "report.json" else half, out)
    content = (out / name).read_text()
    (out / name).write_text(content[: len(content) // 2])
    with unchanged(out):
        done = command(*line(place, out))
        assert done.code == 1 and name in done.error and "--fresh" in done.error
    assert command(*line(place, out, "--fresh")).code == 0
    assert weights(out) == weights(place / "whole")


def test_a_run_that_did_nothing_does_not_bind_the_directory(place, tmp_path):
    """Killed before the first statistics, it may be followed by any other."""
    out = tmp_path / "out"
    process = start(line(place, out, "--seed", "5"), tmp_path / "log", kill_at=("layer-00000", 1))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (out / ".cospadi/fingerprint.json").exists()
    finish(place, out)


def test_a_hopeless_run_leaves_nothing(place, tmp_path):
    """An error that the same command would only meet again: statistics of a layer are there, no group is."""
    shutil.copytree(place / "tiny", tmp_path / "bad")
    for path in (tmp_path / "bad").glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "layers.1.input_layernorm" in name:
                tensors[name][2] = float("inf")
        save_file(tensors, path, {"format": "pt"})
    arguments = ["compress", tmp_path / "bad", tmp_path / "new/out", "--recipe", place / "r.yaml"]
    done = command(*arguments)
    assert done.code == 1 and "model.layers.1.self_attn.q_proj" in done.error and "layers.0" in done.err
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    assert command(*arguments).code == 1
    assert list(tmp_path.joinpath("new").iterdir()) == []


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["fingerprint.json", "layer-00001", "0004.safetensors", "recipe.yaml", "report.json"])
def test_no_space_left(place, tmp_path, monkeypatch, part):
    out = tmp_path / "out"
    real = Path.open

    def full(self: Path, mode: str = "r", *arguments: object, **options: object):
        if "w" in mode and part in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        done = command(*line(place, out))
    assert done.code == 1, done.err
    assert "space" in done.error and "Traceback" not in done.err
    assert not (out / "report.json").exists()
    finish(place, out)


def test_no_space_left_for_the_weights(place, tmp_path):
    """Real writes that fail: no file may be longer than the statistics of a layer, and the weights are."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(line(place, out), log, file_limit=36_000)
    process.join(120)
    assert process.exitcode == 1, log.read_text()
    assert "no space left" in log.read_text().splitlines()[-1]
    assert not (out / "config.json").exists() and not list(out.glob("model*"))
    assert "8 of 8 groups were already finished" in finish(place, out)


def test_the_directory_may_not_be_written(place, tmp_path, monkeypatch):
    real = Path.mkdir

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        if self.name == ".cospadi":
            raise PermissionError(errno.EACCES, "Permission denied")
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = command(*line(place, tmp_path / "out"))
    assert done.code == 1 and "Permission denied" in done.error and "another directory" in done.error


def test_a_journal_of_tensors_of_a_foreign_shape_is_refused(place, half):
    """A group file that is whole but not of this plan must not end up in a checkpoint."""
    import torch

    path = half / ".cospadi/groups/0001.safetensors"
    info = {"error": 0.0, "missed": 0.0, "energy": 1.0, "seconds": 0.0}
    save_file({"codes.values": torch.zeros(3, 3)}, path, {"info": json.dumps(info)})
    done = command(*line(place, half))
    assert done.code == 1 and "0001.safetensors" in done.error and "delete" in done.error
    assert not (half / "config.json").exists()
