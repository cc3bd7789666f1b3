"""The whole command on a tiny model, as on a GPU but for the clock."""

import json

import pytest
import torch

from command import command
from tiny import save_tiny, tiny_text

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", **WIDE)


def test_layers_whole_models_and_loading(tiny, tmp_path):
    arguments = ("--keep", "0.8", "--bits", "16,8", "--tokens", "1,3", "--layers", 2, "--prompt", 8, "--quick")
    out = tmp_path / "out"
    done = command("benchmark", tiny, *arguments, "--load", "--device", "cpu", "--seed", 3, "--out", out, "--json")
    assert done.code == 0, done.err
    data = done.json
    assert len(data["layers"]) == 4 * 2 * 2
    times = {"us", "dense_us", "of_dense", "low_rank_us", "bitmask_us", "bytes_per_second", "of_copy", "error"}
    for row in data["layers"]:
        assert times <= row.keys() and all(row[name] > 0 for name in times)
        assert row["bytes"] <= 0.8 * 2 * row["d_in"] * row["d_out"]
    assert [row["variant"] for row in data["models"]] == ["dense", "keep 0.8, 16 bits", "keep 0.8, 8 bits"]
    for row in data["models"]:
        assert row["layers"] == 2 and row["prompt"] == 8 and row["device_bytes"] is None
        assert row["keep"] is None or min(row["decode_eager_of_dense"], row["prefill_of_dense"]) > 0
    assert data["loading"][0]["file_bytes"] < data["loading"][0]["dense_file_bytes"]
    assert data["seed"] == 3 and data["command"].startswith("cospadi benchmark") and data["device"].startswith("cpu")
    assert data["versions"]["torch"] and data["copy_bytes_per_second"] > 1e8
    assert {path.name for path in out.iterdir()} == {f"benchmark.{kind}" for kind in ("json", "svg", "png")}
    written = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    assert written["layers"] == data["layers"] and str(tmp_path) not in json.dumps(written)


def test_a_compressed_checkpoint_is_measured_as_it_is_stored(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(), encoding="utf-8")
    flags = ("--method", "pursuit", "--keep", 0.7, "--calibration", text, "--samples", 2, "--seq-len", 32)
    assert command("compress", tiny, tmp_path / "small", *flags).code == 0
    done = command("benchmark", tmp_path / "small", "--tokens", 1, "--prompt", 8, "--quick", width=80)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.lstrip().startswith("as stored") for line in lines)
    assert any("64→128 q+k+v, dense" in line for line in lines)
    assert sum("bitmask, same bytes" in line for line in lines) == 4
    assert sum("keep 0.7" in line for line in lines) == 4


def test_what_the_default_method_stores_is_measured_whole(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(), encoding="utf-8")
    flags = ("--keep", 0.3, "--calibration", text, "--samples", 2, "--seq-len", 32)
    report = command("compress", tiny, tmp_path / "small", *flags, "--json").json
    assert {group["method"] for group in report["groups"]} <= {"gptq", "pursuit"}
    done = command("benchmark", tmp_path / "small", "--tokens", 1, "--prompt", 8, "--quick", "--json")
    assert done.code == 0, done.err
    plain, stored = done.json["models"]
    saved = report["bytes_before"] - report["bytes_after"]
    assert plain["weight_bytes"] - stored["weight_bytes"] == saved - 1  # a byte stands in for the first weight


BAD = [
    (("--shapes", "llama-9"), 1, "no shape 'llama-9'"),
    (("--keep", "1.5"), 2, "--keep '1.5': give shares above 0 and up to 1"),
    (("--keep", "a"), 2, "--keep 'a'"),
    (("--keep", ","), 2, "nothing to measure"),
    (("--bits", "5"), 2, "--bits '5': give some of 16,8,4,3,2"),
    (("--tokens", "0"), 2, "--tokens '0'"),
    (("--device", "tpu"), 1, "tpu"),
    (("--load",), 2, "name a directory"),
    (("--layers", "31"), 1, "has 30 decoder layers, not 31"),
    (("--keep", "0.000001"), 1, "needs at least"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=lambda value: str(value)[:24])
def test_bad_input_is_one_clear_line(arguments, code, message):
    done = command("benchmark", *arguments, *(() if "--device" in arguments else ("--device", "cpu")))
    assert done.code == code
    assert message in done.error and done.out == ""


def test_results_are_not_written_over(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = command("benchmark", tiny, "--out", tmp_path)
    assert done.code == 1 and "is not empty" in done.error
    assert command("benchmark", tiny, "--shapes", "llama-3-8b").code == 2
    assert "there is no such directory" in command("benchmark", "./absent").error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tiny, tmp_path):
    shape = ("--tokens", "1,3,70", "--keep", "0.8", "--layers", 2, "--prompt", 16, "--quick")
    done = command("benchmark", tiny, *shape, "--load", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    data = done.json
    assert len(data["layers"]) == 4 * 2 * 3 and data["kernels"]
    for row in data["models"]:
        assert row["device_bytes"] >= row["weight_bytes"]
        assert row["keep"] is None or min(row["decode_graph_of_dense"], row["prefill_of_dense"]) > 0
    assert data["loading"][0]["device_bytes"] > 0
