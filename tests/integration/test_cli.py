"""Every command: what it prints, what it leaves, and what it says when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from command import Done, command, snapshot, unchanged, weights
from cospadi.checkpoint import factor_bytes
from cospadi.embedded import model_path, stdlib_texts
from tiny import byte_tokenizer, save_tiny, tiny_text

QUICK = ["--samples", "8", "--seq-len", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, a text, a recipe that makes runs quick, and a compressed checkpoint."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "tiny", "llama")
    (folder / "text.txt").write_text(tiny_text(6000), encoding="utf-8")
    recipe = {
        "method": "pursuit",
        "keep": 0.8,
        "allocation": "uniform",
        "options": {"rounds": 2},
        "calibration": {"source": "text.txt", "samples": 8, "seq_len": 32},
    }
    (folder / "quick.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert command("compress", "tiny", "small", "--recipe", "quick.yaml").code == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    """Every test works in that folder, without the hub."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield place
    shutil.rmtree("out", ignore_errors=True)


def quick(*arguments: object) -> Done:
    """The quick run of the tiny model into ``out``, which must not be there afterwards if it fails."""
    return command("compress", "tiny", "out", "--recipe", "quick.yaml", *arguments)


def refused(done: Done, *words: str, code: int = 1) -> None:
    """One clear line, the right exit code, nothing on stdout, no traceback."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err and "internal error" not in done.err
    assert done.err.count("Error: ") == 1 and done.err.splitlines()[-1].startswith("Error: ")
    for word in words:
        assert word in done.error, done.error


# --- starting up -------------------------------------------------------------------------------------------------


def test_help_imports_nothing_slow():
    script = (
        "import sys, cospadi.cli\n"
        "sys.argv = ['cospadi', *sys.argv[1:]]\n"
        "try: cospadi.cli.main()\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["compress", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"
        assert "cospadi" in done.stdout


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "cospadi", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cospadi ") and done.stderr == ""


def test_usage_errors_exit_with_2():
    refused(command("compres"), "compress", code=2)
    refused(command("compress", "tiny"), "OUT", "cospadi compress --help", code=2)
    refused(command("compress", "tiny", "out", "--kep", "0.8"), "--keep", code=2)
    refused(command("compress", "tiny", "out", "--keep", "much"), "--keep", code=2)
    refused(command("compress", "tiny", "out", "--calibration", "text.txt"), "--keep", "--target-size", code=2)
    refused(quick("--keep", "0.5", "--target-size", "1MB"), "--keep", "--target-size", code=2)
    refused(quick("--set", "rounds"), "KEY=VALUE", code=2)
    refused(quick("--set", "rounds=[1"), "rounds", code=2)
    refused(command("evaluate", "small"), "--text", code=2)
    refused(command("evaluate", "small", "--text", "text.txt", "--batch", "0"), "--batch", code=2)
    refused(command("generate", "small", "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens", code=2)
    refused(command("export", "small", "dense"), "--dense", code=2)
    refused(command("export", "small", "dense", "--dense", "--dtype", "int8"), "--dtype", "bfloat16", code=2)
    assert not Path("out").exists() and not Path("dense").exists()


def test_without_arguments_it_shows_the_help():
    done = command()
    assert done.code == 2 and "compress" in done.err + done.out


def test_an_unforeseen_error_is_one_line_and_debug_shows_where(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("cospadi.engine.compress.make_plan", broken)
    done = quick()
    assert done.code == 1 and "surprise" in done.error and "--debug" in done.error and "Traceback" not in done.err
    assert "in broken" in quick("--debug").err
    assert not Path("out").exists()


# --- models ------------------------------------------------------------------------------------------------------


def foreign_model(name: str, **config: object) -> str:
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_tokenizer().save_pretrained(name)
    return name


def altered_model(name: str, layer: str, value: float) -> str:
    """A copy of the tiny model with one number of one tensor replaced."""
    shutil.copytree("tiny", name)
    for path in sorted(Path(name).glob("*.safetensors")):
        tensors = load_file(path)
        for key in tensors:
            if layer in key:
                tensors[key].view(-1)[3] = value
                save_file(tensors, path, {"format": "pt"})
                return name
    raise AssertionError(layer)


def test_models_that_cannot_be_used(place):
    def run(model: str) -> Done:
        return command("compress", model, "out", "--recipe", "quick.yaml")

    refused(run("./missing"), "missing", "no such directory")
    refused(run("x" * 5000), "xxx…", "no such directory")
    refused(run("not-here"), "not-here", "neither a local directory")
    refused(run("text.txt"), "text.txt", "is a file")
    Path("empty").mkdir()
    refused(run("empty"), "empty", "config.json")
    refused(run(foreign_model("t5", model_type="t5", architectures=["T5Model"], is_encoder_decoder=True)), "T5Model")
    refused(run(foreign_model("clip", model_type="clip", architectures=["CLIPModel"])), "CLIPModel", "causal")
    refused(run(foreign_model("odd", model_type="nonesuch")), "no architecture 'nonesuch'", "upgrade")
    Path("odd/config.json").write_text('{"model_type":', encoding="utf-8")
    refused(run("odd"), "config.json")
    save_tiny("gpt2", "gpt2")
    refused(run("gpt2"), "GPT2LMHeadModel", "Conv1D")
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 44, "num_key_value_heads": 2}
    save_tiny("moe", "mixtral", **experts)
    refused(run("moe"), "MixtralForCausalLM", "experts")
    refused(command("estimate", "moe", "--keep", "0.5"), "MixtralForCausalLM", "experts")
    refused(run("small"), "small", "already compressed")
    assert not Path("out").exists()


def test_a_method_that_fails_names_the_layer(monkeypatch):
    def ill_conditioned(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr("cospadi.methods.pursuit.pursuit", ill_conditioned)
    refused(quick(), "model.layers.0.self_attn.q_proj+k_proj+v_proj", "pursuit", "converge")
    assert not Path("out").exists()


def test_damaged_models_name_the_file_or_the_layer():
    def run(model: str) -> Done:
        return command("compress", model, "out", "--recipe", "quick.yaml")

    refused(run(altered_model("nan", "layers.1.mlp.up_proj", float("nan"))), "model.layers.1.mlp.up_proj", "NaN")
    refused(run(altered_model("inf", "layers.1.input_layernorm", float("inf"))), "model.layers.1.self_attn.q_proj")
    for model in ("nan", "inf"):
        refused(command("evaluate", model, "--text", "text.txt", "--seq-len", "32"), "NaN", "layers.1.")
        for temperature in (0, 1):
            refused(command("generate", model, "--prompt", "a", "--temperature", temperature), "NaN", "layers.1.")
    shutil.copytree("tiny", "short")
    weight = sorted(Path("short").glob("*.safetensors"))[0]
    weight.write_bytes(weight.read_bytes()[:-10])
    refused(run("short"), weight.name, "bytes")
    weight.unlink()
    refused(run("short"), weight.name, "missing")
    assert not Path("out").exists()


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, ["none.txt", "no such file"]),
        ("blank.txt", b" \n", ["blank.txt", "no text"]),
        ("blank.jsonl", b"", ["blank.jsonl", "no text"]),
        ("latin.txt", b"caf\xe9", ["latin.txt", "UTF-8"]),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": oops}\n', ["bad.jsonl", "line 3"]),
        ("body.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["body.jsonl", "line 2", "'text'", "'body'"]),
        ("table.csv", b"a,b\n1,2", ["table.csv", "'a', 'b'", "--text-field"]),
        ("table.tsv", b"a\tb", ["table.tsv", ".csv", ".jsonl"]),
        ("brief.txt", b"too short", ["brief.txt", "9 tokens", "32"]),
        ("deep.json", b"[" * 100_000, ["deep.json", "JSON", "recursion"]),
        ("digits.jsonl", b'"a"\n' + b"1" * 5000, ["digits.jsonl", "line 2", "JSON", "digits"]),
    ],
)
def test_texts_that_cannot_be_used(name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    refused(quick("--calibration", name), *words)
    assert not Path("out").exists()
    refused(command("evaluate", "small", "--text", name, "--seq-len", "32"), *words)


def test_a_text_is_required():
    refused(command("compress", "tiny", "out", "--keep", "0.8"), "--calibration")
    assert not Path("out").exists()


def test_fewer_sequences_than_asked_is_a_warning(tmp_path):
    (tmp_path / "few.txt").write_text(tiny_text(100), encoding="utf-8")
    done = quick("--calibration", tmp_path / "few.txt")
    assert done.code == 0 and "only 3 of the 8 requested sequences of 32 tokens" in " ".join(done.out.split())
    shutil.rmtree("out")
    done = quick("--calibration", tmp_path / "few.txt", "--json")
    assert "of the 8 requested" in done.err and "of the 8 requested" in done.json["warnings"][0]
    shutil.rmtree("out")


def test_a_text_that_cannot_describe_the_layers_is_a_warning():
    done = quick("--samples", "1", "--json")
    assert done.code == 0 and done.json["warnings"] == [
        line.removeprefix("warning: ") for line in done.err.splitlines() if line.startswith("warning")
    ]
    assert "32 calibration tokens are fewer than the 44 inputs" in done.json["warnings"][0]


def test_a_warning_of_a_measurement_is_one_line_without_a_place(tmp_path):
    save_tiny(tmp_path / "brief", max_position_embeddings=16)
    done = command("evaluate", tmp_path / "brief", "--text", "text.txt", "--seq-len", "32", "--json")
    told = [line for line in done.err.splitlines() if "16 positions" in line]
    assert done.code == 0 and len(told) == 1 and told[0].startswith("warning: ") and ".py" not in done.err


# --- sizes, methods, recipes, devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "1", "-0.5", "80", "nan"])
def test_keep_must_be_a_share(keep):
    refused(quick("--keep", keep), "between 0 and 1", keep)
    refused(command("estimate", "tiny", "--keep", keep), "between 0 and 1")
    assert not Path("out").exists()


@pytest.mark.parametrize("method", ["auto", "pursuit", "svd"])
def test_the_least_keep_that_is_named_is_possible(method):
    run = ["tiny", "out", "--method", method, "--calibration", "text.txt", "--samples", 8, "--seq-len", 32]
    done = command("compress", *run, "--keep", "0.001")
    refused(done, "the least possible is")
    least = done.error.rsplit(" ", 1)[1]
    assert command("compress", *run, "--keep", least, "--dry-run").code == 0
    refused(command("estimate", "tiny", "--method", method, "--keep", float(least) - 1e-4), least)


def test_target_sizes_that_cannot_be_reached():
    refused(quick("--target-size", "large"), "large", "5GB")
    refused(quick("--target-size", "0"), "'0'")
    refused(quick("--target-size", "20kB"), "20,000", "embeddings")
    refused(quick("--target-size", "1GB"), "already fits")
    done = quick("--target-size", "46kB")
    refused(done, "46,000", "the least possible is")
    least = done.error.rsplit(" ", 1)[1].replace(",", "")
    assert command("estimate", "tiny", "--method", "pursuit", "--target-size", least).code == 0
    assert not Path("out").exists()


def test_methods_and_options_that_do_not_exist():
    refused(quick("--method", "pursiut"), "'pursiut'", "did you mean 'pursuit'")
    refused(quick("--set", "round=3"), "'round'", "did you mean 'rounds'")
    refused(quick("--set", "rounds=many"), "rounds", "integer")
    refused(quick("--set", "rounds=true"), "rounds", "True", "no truth value")
    refused(quick("--set", "pattern=40:32"), "40:32")
    refused(quick("--set", "value_bits=5"), "bits")
    refused(quick("--set", "rho=0", "--set", "pattern=free"), "pursuit")
    refused(quick("--grouping", "layers"), "grouping", "siblings")
    refused(quick("--samples", "0"), "calibration.samples cannot be 0: it must be at least 1")
    refused(quick("--seed", "-1"), "seed cannot be -1: it must be at least 0")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keeep: 0.5\n", ["'keeep'", "did you mean 'keep'"]),
        ("calibration: {sampels: 3}\n", ["'calibration.sampels'", "did you mean 'samples'"]),
        ("calibration: 3\n", ["calibration cannot be 3", "section of keys"]),
        ("only: ','\n", ["only cannot be ',': it names no module"]),
        ("- keep\n", ["list"]),
        ("keep: 0.5\n  method: [\n", ["line 2"]),
        ("keep: half\n", ["keep cannot be 'half': it must be a share such as 0.8 or 80%"]),
        ("keep: 0.5\ntarget_size: 3MB\n", ["keep", "target_size"]),
        ("method: pursiut\nkeep: 0.5\ncalibration: {source: text.txt}\n", ["did you mean 'pursuit'"]),
    ],
)
def test_recipes_with_mistakes(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    refused(command("compress", "tiny", "out", "--recipe", tmp_path / "r.yaml"), *words)
    assert not Path("out").exists()


def test_recipes_that_cannot_be_read():
    refused(command("compress", "tiny", "out", "--recipe", "nowhere.yaml"), "nowhere.yaml", "not exist")
    refused(command("compress", "tiny", "out", "--recipe", "tiny"), "tiny", "cannot be read")
    assert not Path("out").exists()


def test_devices_that_are_not_there():
    refused(quick("--device", "gpu"), "'gpu'", "cuda:N")
    refused(quick("--device", "cuda:99"), "cuda:99", "--device cpu")
    refused(command("estimate", "tiny", "--keep", "0.8", "--device", "gpu"), "'gpu'", "cuda:N")
    assert command("estimate", "tiny", "--keep", "0.8", "--device", "cuda:99", "--json").json["device"] is None
    refused(command("evaluate", "small", "--text", "text.txt", "--device", "tpu"), "'tpu'")
    refused(command("generate", "small", "--prompt", "a", "--device", "meta"), "'meta'")
    assert not Path("out").exists()


def test_flags_override_the_recipe():
    def plan(*arguments: object) -> dict:
        return command("estimate", "tiny", "--recipe", "quick.yaml", *arguments, "--json").json

    assert plan()["keep_requested"] == 0.8
    assert plan("--keep", "0.6")["keep_requested"] == 0.6
    assert plan("--target-size", "65kB")["keep_requested"] not in (0.8, 0.6)
    assert {group["method"] for group in plan("--method", "svd")["groups"]} == {"svd"}
    assert len(plan("--grouping", "matrix")["groups"]) > len(plan()["groups"])
    assert plan("--set", "value_bits=8")["groups"][0]["bits"]["values"] == 8


# --- the output directory ----------------------------------------------------------------------------------------


def test_output_directories_that_are_not_ours(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "model.safetensors").write_bytes(b"precious")
    before = snapshot(tmp_path)
    with unchanged(tmp_path):
        for flags in ([], ["--fresh"]):
            refused(command("compress", "tiny", theirs, "--recipe", "quick.yaml", *flags), "not empty")
        file = theirs / "model.safetensors"
        refused(command("compress", "tiny", file, "--recipe", "quick.yaml"), "is a file")
        refused(command("compress", "tiny", file / "out", "--recipe", "quick.yaml"), "is a file")
        refused(command("export", "small", theirs, "--dense"), "not empty")
        refused(command("export", "small", file, "--dense"), "is a file")
        refused(command("export", "small", "small", "--dense"), "small")
    assert snapshot(tmp_path) == before and (theirs / "model.safetensors").read_bytes() == b"precious"
    with unchanged(Path("tiny")):
        refused(command("compress", "tiny", "tiny", "--recipe", "quick.yaml"), "not empty")


def test_a_finished_run_is_left_alone_and_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    shutil.copytree("small", out)
    for name in ("notes.txt", "model-mine.safetensors", "assets/mine.png"):
        (out / name).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    with unchanged(out):
        done = command("compress", "tiny", out, "--recipe", "quick.yaml")
        assert done.code == 0 and "already complete" in done.err
        refused(command("compress", "tiny", out, "--recipe", "quick.yaml", "--keep", "0.7"), "0.8 → 0.7", "--fresh")
        refused(command("compress", "tiny", out, "--recipe", "quick.yaml", "--seed", "5"), "seed: 0 → 5", "--fresh")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert command("compress", "tiny", out, "--recipe", "quick.yaml", "--keep", "0.7", "--fresh").code == 0
    assert {(out / name).read_text() for name in ("notes.txt", "model-mine.safetensors", "assets/mine.png")} == {"mine"}
    assert command("inspect", out, "--json").json["keep_actual"] <= 0.7


def test_a_damaged_finished_run_is_noticed(tmp_path):
    out = tmp_path / "out"
    shutil.copytree("small", out)
    weight = out / "model.safetensors"
    weight.write_bytes(weight.read_bytes()[:-1])
    refused(command("compress", "tiny", out, "--recipe", "quick.yaml"), "model.safetensors", "--fresh")
    assert command("compress", "tiny", out, "--recipe", "quick.yaml", "--fresh").code == 0
    assert weights(out) == weights(Path("small"))


def test_odd_paths(tmp_path, monkeypatch):
    home = tmp_path / "a b [bold] 'q' ünï"
    shutil.copytree("tiny", home / "möd el")
    (home / "te xt.txt").write_text(tiny_text(3000), encoding="utf-8")
    shutil.copy("quick.yaml", home)
    monkeypatch.chdir(home)
    flags = ["--recipe", "quick.yaml", "--calibration", "te xt.txt"]
    done = command("compress", "möd el", "not yet/there/øut", *flags)
    assert done.code == 0
    assert "not yet/there/øut/report.html" in done.out and "generate 'not yet/there/øut'" in done.out
    assert command("evaluate", "not yet/there/øut", "--text", home / "te xt.txt", "--seq-len", "32").code == 0
    monkeypatch.chdir(home / "möd el")
    done = command(
        "compress", ".", home / "dot", "--recipe", "../quick.yaml", "--calibration", "../te xt.txt", "--json"
    )
    assert done.code == 0 and done.json["model"] == "möd el"
    assert weights(home / "dot") == weights(home / "not yet/there/øut")


def test_files_get_the_permissions_of_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        assert command("compress", "tiny", tmp_path / "out", "--recipe", "quick.yaml").code == 0
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes["model.safetensors"] == 0o640 and set(modes.values()) == {0o640}


# --- running out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ImportError("x.so: failed to map segment from shared object"), OSError(12, os.strerror(12))],
)
def test_no_memory_where_nobody_counts_on_it(monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    assert command("inspect", "small").code == 0
    monkeypatch.setattr("cospadi.evaluation.inspect", fail)
    refused(command("inspect", "small"), "out of memory", "close other programs")


def test_out_of_memory_says_what_to_do(monkeypatch):
    def hungry(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("cospadi.methods.pursuit.pursuit", hungry)
        refused(quick(), "memory", "--samples", "--device")
    with monkeypatch.context() as patch:
        patch.setattr("cospadi.calibration.statistics.Accumulator.add", hungry)
        refused(command("compress", "tiny", "out2", "--recipe", "quick.yaml"), "memory", "--samples", "--device")
    assert quick().code == 0  # the same command goes on
    assert weights(Path("out")) == weights(Path("small"))
    shutil.rmtree("out")
    shutil.rmtree("out2", ignore_errors=True)


# --- damaged checkpoints -----------------------------------------------------------------------------------------


def shorten(folder: Path, by: int = 7) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-by])


def garble_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20] ^= 0xFF
    (folder / "model.safetensors").write_bytes(data)


def flip_mask(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if key.endswith(".mask"))][2, 0] ^= 1
    save_file(tensors, path, {"format": "pt"})


def drop_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith(".values"))]
    save_file(tensors, path, {"format": "pt"})


def change_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["groups"][0]["d_in"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def future_version(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:200])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (shorten, "model.safetensors"),
        (garble_header, "model.safetensors"),
        (flip_mask, ".mask"),
        (drop_tensor, ".values"),
        (change_shape, "model.layers.0"),
        (future_version, "99"),
        (cut_config, "config.json"),
        (remove_weights, "model.safetensors"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, word):
    bad = tmp_path / "bad"
    shutil.copytree("small", bad)
    damage(bad)
    refused(command("inspect", bad), word)
    refused(command("evaluate", bad, "--text", "text.txt", "--seq-len", "32"), word)
    refused(command("generate", bad, "--prompt", "a"), word)
    refused(command("export", bad, tmp_path / "dense", "--dense"), word)
    assert not (tmp_path / "dense").exists()


def test_what_is_no_checkpoint():
    refused(command("inspect", "./nowhere"), "nowhere")
    refused(command("evaluate", "./nowhere", "--text", "text.txt"), "nowhere")
    refused(command("evaluate", "small", "--text", "text.txt", "--against", "./nowhere"), "nowhere")
    refused(command("generate", "./nowhere", "--prompt", "a"), "nowhere")
    refused(command("export", "./nowhere", "dense", "--dense"), "nowhere: there is no such directory")


def test_a_damaged_report_is_named_where_it_is_read(tmp_path):
    shutil.copytree("small", tmp_path / "small")
    for content in ("{", "[]", '{"groups": [3]}'):
        (tmp_path / "small/report.json").write_text(content, encoding="utf-8")
        refused(command("inspect", tmp_path / "small"), "report.json", "delete it")
    (tmp_path / "small/report.json").unlink()
    assert command("inspect", tmp_path / "small").code == 0


def test_factors_that_are_not_finite_or_overflow_are_refused(tmp_path):
    shutil.copytree("small", tmp_path / "bad")
    (tmp_path / "bad/SHA256SUMS").unlink()
    path = tmp_path / "bad/model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("down_proj.dictionary"))
    tensors[name][0, 0] = 1e30  # bfloat16 holds it
    save_file(tensors, path, {"format": "pt"})
    assert command("inspect", tmp_path / "bad").code == 0
    export = ["export", tmp_path / "bad", tmp_path / "dense", "--dense"]
    refused(command(*export, "--dtype", "float16"), name.removesuffix(".dictionary"), "float16")
    assert not (tmp_path / "dense").exists()
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    refused(command("inspect", tmp_path / "bad"), name, "NaN")
    refused(command(*export), name.removesuffix(".dictionary"), "NaN")
    assert not (tmp_path / "dense").exists()


# --- what is printed ---------------------------------------------------------------------------------------------


def one_object(done: Done) -> dict:
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1 and done.out.endswith("\n")
    assert isinstance(done.json, dict)
    return done.json


def test_json_of_every_command(tmp_path):
    text = ["--text", "text.txt", "--seq-len", "32"]
    report = one_object(quick("--json"))
    assert {"keep_requested", "keep_actual", "bytes_before", "bytes_after", "file_bytes", "seconds"} <= report.keys()
    assert one_object(quick("--json"))["keep_actual"] == report["keep_actual"]
    shutil.rmtree("out")
    dry = one_object(quick("--dry-run", "--json"))
    assert not Path("out").exists()
    estimate = one_object(command("estimate", "tiny", "--recipe", "quick.yaml", "--json"))
    for told in (estimate, dry):  # seconds are guessed from what the machine does at the moment
        assert told.pop("seconds")["total"] > 0
    assert estimate == dry
    for key in ("keep_requested", "keep_actual", "bytes_before", "bytes_after", "parameters"):
        assert estimate[key] == report[key], key
    strip = ("name", "method", "atoms", "nonzeros", "bits", "bytes")
    assert [[g[k] for k in strip] for g in estimate["groups"]] == [[g[k] for k in strip] for g in report["groups"]]
    seen = one_object(command("inspect", "small", "--json"))
    assert [[g[k] for k in (*strip, "error")] for g in seen["groups"]] == [
        [g[k] for k in (*strip, "error")] for g in report["groups"]
    ]
    found = one_object(command("evaluate", "small", *text, "--json"))
    assert {"perplexity", "tokens", "bytes"} <= found.keys() and "dense_perplexity" not in found
    both = one_object(command("evaluate", "small", *text, "--against", "tiny", "--json"))
    assert both["perplexity"] == found["perplexity"] and both["dense_bytes"] > both["bytes"]
    assert one_object(command("evaluate", "tiny", *text, "--json"))["perplexity"] == both["dense_perplexity"]
    said = one_object(command("generate", "small", "--prompt", "ab\n", "--max-new-tokens", "4", "--json"))
    assert said["prompt"] == "ab\n" and said["tokens"] == 4
    assert len(one_object(command("methods", "--json"))["methods"]) > 5
    assert one_object(command("methods", "pursuit", "--json"))["methods"][0]["options"]["rounds"] > 0
    assert one_object(command("doctor", "--json"))["healthy"] is True
    stock = one_object(command("export", "small", tmp_path / "dense", "--dense", "--json"))
    assert stock["file_bytes"] > seen["file_bytes"]
    dense = one_object(command("evaluate", tmp_path / "dense", *text, "--json"))
    assert dense["perplexity"] == pytest.approx(found["perplexity"], rel=0.02)


def test_schema_of_a_recipe():
    schema = json.loads(command("methods", "--schema").out)
    assert {"keep", "target_size", "method", "calibration"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


def test_results_go_to_stdout_and_the_rest_to_stderr():
    done = quick()
    assert done.code == 0 and "Bytes kept" in done.out and "factorise" not in done.out and "factorise" in done.err
    assert "Loading weights" not in done.err and "Writing model shards" not in done.err
    shutil.rmtree("out")
    prompt = "a [red]:smile: " + "long " * 60
    said = command("generate", "small", "--prompt", prompt, "--max-new-tokens", "2", width=40)
    assert prompt in said.out and "tokens/s" in said.err and "Loading" not in said.err


@pytest.mark.parametrize("name", ["compress", "estimate", "inspect", "evaluate", "methods", "doctor"])
def test_tables_fit_a_terminal(name):
    arguments = {
        "compress": ["tiny", "small", "--recipe", "quick.yaml"],
        "estimate": ["tiny", "--keep", "0.7"],
        "inspect": ["small"],
        "evaluate": ["small", "--text", "text.txt", "--seq-len", "32", "--against", "tiny"],
    }.get(name, [])
    done = command(name, *arguments, width=80)
    assert done.code == 0 and len(done.out.splitlines()) > 3
    assert max(map(len, done.out.splitlines())) <= 80


# --- numbers that must be true, on the embedded model ------------------------------------------------------------


@pytest.fixture(scope="module")
def text_of_python(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "python.txt"
    path.write_text("\n".join(stdlib_texts("calibration")[:3]), encoding="utf-8")
    return path


def embedded(out: Path, text: Path, *arguments: object) -> dict:
    flags = ["--calibration", text, "--samples", "4", "--seq-len", "128"]
    flags += ["--method", "pursuit", "--set", "rounds=2"]
    done = command("compress", model_path(), out, *flags, *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def test_bytes_of_a_report_are_those_on_disk(tmp_path, text_of_python):
    report = embedded(tmp_path / "out", text_of_python, "--keep", "0.8")
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert stored["bytes_after"] == report["bytes_after"] == factor_bytes(tmp_path / "out")
    assert report["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("model*.safetensors"))
    assert 0.8 * 0.995 <= report["keep_actual"] <= 0.8
    assert report["keep_actual"] == report["bytes_after"] / report["bytes_before"]
    assert sum(group["bytes"] for group in report["groups"]) == report["bytes_after"]
    assert {"name", "method", "atoms", "nonzeros", "bits", "bytes", "error"} <= report["groups"][0].keys()
    assert all(0 <= group["error"] < 1 for group in report["groups"])
    assert report["seconds"]["total"] > 0
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["keep"] == 0.8


def test_a_target_size_holds_for_all_files_together(tmp_path, text_of_python):
    target = 4_300_000
    report = embedded(tmp_path / "out", text_of_python, "--target-size", "4.3MB")
    pages = ("report.json", "report.html", "README.md", "recipe.yaml")
    files = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir() if p.is_file() and p.name not in pages}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    assert 0.99 * target <= sum(files.values()) <= target
    assert report["bytes_after"] == factor_bytes(tmp_path / "out")


def test_two_runs_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        assert command("compress", "tiny", tmp_path / name, "--recipe", "quick.yaml").code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(Path("small"))
    assert snapshot(tmp_path / "one")["config.json"] == snapshot(tmp_path / "two")["config.json"]
