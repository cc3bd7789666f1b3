import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.factory import compress_randomly
from cospadi.checkpoint import export_dense, factor_bytes, load, save, validate
from cospadi.errors import OutputError
from tiny import byte_tokenizer, tiny_model

TESTS = Path(__file__).parents[2]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_same_model_same_bytes(tmp_path):
    for name in ("a", "b"):
        model = tiny_model("llama", dtype=torch.bfloat16)
        save(model, byte_tokenizer(), tmp_path / name, compress_randomly(model), max_shard_size="20KB")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1  # whoever may read one may read all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_take_sixteen_bits_whatever_the_model_computes_in(tmp_path, dtype):
    model = tiny_model("llama", dtype=dtype)
    groups = compress_randomly(model)
    save(model, None, tmp_path, groups)
    assert factor_bytes(tmp_path) == sum(group.bytes for group in groups)
    layer = model.get_submodule(groups[0].modules[0])
    assert layer.values.dtype == dtype  # the model itself is as it was
    stored = load_file(tmp_path / "model.safetensors")[f"{layer.name}.values"]
    assert stored.dtype == (torch.float16 if dtype == torch.float16 else torch.bfloat16)
    assert torch.equal(stored.to(dtype), layer.values)


def test_trained_factors_are_saved(tmp_path):
    model = tiny_model("llama")
    groups = compress_randomly(model, ["free16"])
    layer = model.get_submodule(groups[1].modules[0])
    layer.dictionary.requires_grad_(True)
    with torch.no_grad():
        layer.dictionary.add_(0.5)
    save(model, None, tmp_path, groups)
    assert layer.dictionary.requires_grad
    stored = load_file(tmp_path / "model.safetensors")[f"{layer.name}.dictionary"]
    assert torch.equal(stored, layer.dictionary.to(torch.bfloat16))


def test_an_earlier_checkpoint_is_replaced_whole(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    groups = compress_randomly(model)
    (tmp_path / "notes.txt").write_text("mine")
    save(model, None, tmp_path, groups)  # one file
    save(model, None, tmp_path, groups, max_shard_size="20KB")  # several files: the one file must go
    assert not (tmp_path / "model.safetensors").exists()
    validate(tmp_path)
    save(model, None, tmp_path, groups)
    assert {p.name for p in tmp_path.glob("model*")} == {"model.safetensors"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def fail_after(model, monkeypatch, error):
    """Have the model write a part of its files and then fail."""
    write = type(model).save_pretrained

    def broken(self, directory, **options):
        write(self, directory, **options)
        next(Path(directory).glob("*.safetensors")).write_bytes(b"half")
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", broken)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
    ],
)
def test_failed_save_leaves_no_trace(tmp_path, monkeypatch, error, message):
    model = tiny_model("llama", dtype=torch.bfloat16)
    groups = compress_randomly(model)
    save(model, None, tmp_path / "old", groups)
    before = contents(tmp_path / "old")
    fail_after(model, monkeypatch, error)
    for directory in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(OutputError, match=message) as caught:
            save(model, None, directory, groups)
        assert directory.name in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path / "old") == before
    assert contents(tmp_path / "new") == {}


def test_interrupted_save_never_looks_finished(tmp_path, monkeypatch):
    model = tiny_model("llama", dtype=torch.bfloat16)
    groups = compress_randomly(model)
    save(model, None, tmp_path, groups)
    moved = []
    replace = os.replace

    def interrupt(source, target):
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(model, None, tmp_path, groups, max_shard_size="20KB")
    assert moved != ["config.json"] and not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    save(model, None, tmp_path, groups)
    validate(tmp_path)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


SMALL_DISK = """
import resource, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from checkpoints.factory import compress_randomly
from tiny import tiny_model
from cospadi.checkpoint import save
from cospadi.errors import OutputError
model = tiny_model("llama", dtype=torch.bfloat16)
groups = compress_randomly(model)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    save(model, None, sys.argv[2], groups)
except OutputError as error:
    print("OutputError", error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_safetensors_own_write_error(tmp_path):
    """The writer of safetensors reports a full disk in a text only; a limit on file sizes provokes it for real."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(TESTS), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith("OutputError") and "no space left" in done.stdout, done.stdout + done.stderr
    assert contents(tmp_path / "out") == {}


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(OutputError, match="file"):
        save(model, None, tmp_path / "file", compress_randomly(model))


def test_export_does_not_overwrite_its_source(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    save(model, None, tmp_path, compress_randomly(model))
    with pytest.raises(OutputError, match="overwrite"):
        export_dense(tmp_path, tmp_path)
    load(tmp_path)
