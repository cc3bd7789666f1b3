"""`cospadi compress --method masa` from end to end: bytes, native loading, damage, comparison, and `--only`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import cospadi
from command import command, unchanged, weights
from cospadi.checkpoint import load, read_config, validate
from cospadi.checkpoint.formats.shared import SHARED
from cospadi.checkpoint.sizes import file_bytes
from cospadi.errors import CheckpointError
from cospadi.layers.shared_linear import SharedLinear
from tiny import save_tiny, tiny_text

ids = torch.arange(30).reshape(2, 15)
FLAGS = ("--samples", 8, "--seq-len", 32, "--device", "cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FRESH = """
import sys, torch
if sys.argv[2] == "without":
    sys.modules["cospadi"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(30).reshape(2, 15)).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with biases in q, k and v, calibration text, and the compressed model."""
    folder = tmp_path_factory.mktemp("masa")
    save_tiny(folder / "dense", "qwen2", num_hidden_layers=4)
    (folder / "text.txt").write_text(tiny_text(12000), encoding="utf-8")
    done = compress(folder, folder / "small", "--keep", 0.7, "--set", "groups=2", "--set", "least_atoms=1")
    assert done.code == 0, done.err
    return folder


def compress(folder, out, *flags):
    return command(
        "compress", folder / "dense", out, "--method", "masa", *flags, "--calibration", folder / "text.txt", *FLAGS,
        "--json",
    )  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(ids).logits


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def stored(folder):
    """Shapes of all tensors on disk, by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def test_bytes_are_those_on_disk_and_within_the_budget(place):
    out, report = place / "small", report_of(place / "small")
    specs = read_config(out)
    inside = {module for spec in specs for module in spec.modules}
    assert len(inside) == 16 and all(".self_attn." in module for module in inside)
    table = stored(out)
    leaves = {"atoms", "coefficients", "down", "up", "matrix"}
    factors = [s for n, s in table.items() if n.rpartition(".")[0] in inside and n.rpartition(".")[2] in leaves]
    exact = sum(2 * int(torch.Size(shape).numel()) for shape in factors)
    assert report["bytes_after"] == exact == sum(group["bytes"] for group in report["groups"])
    assert report["bytes_before"] == 4 * 2 * (24 * 24 * 2 + 24 * 12 * 2)
    assert report["keep_actual"] == exact / report["bytes_before"] <= 0.7
    assert report["keep_actual"] > 0.68 and report["keep_requested"] == 0.7
    assert report["file_bytes"] == file_bytes(out)
    assert all(name in table for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"))
    assert {len(group["modules"]) for group in report["groups"]} <= {1, 2, 3} and len(report["groups"]) == 8
    assert all(0 <= group["error"] < 1 and len(group["ranks"]) == len(group["modules"]) for group in report["groups"])
    assert any(spec.atoms > 0 and not spec.whole for spec in specs), "nothing is shared: the test says too little"


def test_loads_natively_and_computes_what_was_stored(place):
    model = AutoModelForCausalLM.from_pretrained(place / "small")
    layers = SHARED.layers(model)
    assert len(layers) == 16 and not any(p.requires_grad for _, layer in layers for p in layer.factors().values())
    dense = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float64)
    tensors = {k: v for path in (place / "small").glob("*.safetensors") for k, v in load_file(path).items()}
    for spec in read_config(place / "small"):
        for index, name in enumerate(spec.modules):
            own = {k.removeprefix(f"{name}."): v.double() for k, v in tensors.items() if k.startswith(f"{name}.")}
            weight = own.get("matrix", torch.zeros(spec.d_out, spec.d_in, dtype=torch.float64))
            if "coefficients" in own:
                atoms = tensors[f"{spec.modules[0]}.atoms"].double()
                weight = weight + torch.einsum("s,soi->oi", own["coefficients"], atoms)
            if spec.ranks[index]:
                weight = weight + own["up"] @ own["down"]
            reference.get_submodule(name).weight.data = weight
            if "bias" in own:
                assert torch.equal(own["bias"], dense.get_submodule(name).bias.data)
    wide = AutoModelForCausalLM.from_pretrained(place / "small", dtype=torch.float64)
    torch.testing.assert_close(logits(wide), logits(reference), rtol=1e-9, atol=1e-9)
    assert (logits(wide) - logits(dense)).abs().max() > 1e-3
    composed, _ = cospadi.load(place / "small", dtype=torch.float64, compose=True)
    torch.testing.assert_close(logits(composed), logits(reference), rtol=1e-9, atol=1e-9)
    assert not SHARED.layers(composed) and type(composed.model.layers[0].self_attn.q_proj) is nn.Linear
    small, tokenizer = cospadi.load(place / "small")
    assert isinstance(small.model.layers[0].self_attn.q_proj, SharedLinear) and tokenizer("a").input_ids


def test_generates_the_same_with_and_without_cache(place):
    model = AutoModelForCausalLM.from_pretrained(place / "small", dtype=torch.float32)  # bfloat16 gives ties
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, **options, use_cache=True)
    assert torch.equal(with_cache, model.generate(ids, **options, use_cache=False))
    done = command("generate", place / "small", "--prompt", "ab", "--max-new-tokens", 4, "--device", "cpu", "--json")
    assert done.code == 0 and done.json["tokens"] >= 1


def test_saved_again_it_is_the_same_bytes(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "small")
    model.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again")["model.safetensors"] == weights(place / "small")["model.safetensors"]
    assert validate(tmp_path / "again") == read_config(place / "small")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    # in another dtype, too
    AutoModelForCausalLM.from_pretrained(place / "small", dtype=torch.float32).save_pretrained(tmp_path / "wide")
    validate(tmp_path / "wide")


def test_bare_decoder_and_shards(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "small")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "shards")), logits(model))
    with torch.no_grad():
        bare = AutoModel.from_pretrained(place / "small")(ids).last_hidden_state
        assert torch.equal(bare, model.model(ids).last_hidden_state)


def test_config_flag_composes_while_loading(place, tmp_path):
    config = AutoConfig.from_pretrained(place / "small")
    config.quantization_config["compose"] = True
    composed = AutoModelForCausalLM.from_pretrained(place / "small", config=config)
    assert not SHARED.layers(composed)
    torch.testing.assert_close(
        logits(composed).float(),
        logits(AutoModelForCausalLM.from_pretrained(place / "small")).float(),
        rtol=0.1,
        atol=0.2,
    )
    composed.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), logits(composed))


@pytest.mark.parametrize("with_package", [True, False])
def test_in_a_fresh_process(place, tmp_path, with_package):
    way, result = ("with", {}) if with_package else ("without", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(place / "small"), way, str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=str(Path(sys.prefix)),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | result,
    )
    if with_package:
        assert done.returncode == 0, done.stderr
        here = logits(AutoModelForCausalLM.from_pretrained(place / "small"))
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), here)
    else:
        assert done.returncode != 0 and not (tmp_path / "logits.pt").exists()
        assert "Unknown quantization type, got cospadi_masa" in done.stderr and "mismatch" in done.stderr


def test_evaluate_inspect_and_export(place, tmp_path):
    seen = command("inspect", place / "small", "--json").json
    report = report_of(place / "small")
    assert seen["bytes_after"] == report["bytes_after"] and seen["method"] == "masa"
    assert [row["error"] for row in seen["groups"]] == [row["error"] for row in report["groups"]]
    assert command("inspect", place / "small").code == 0
    text = ("--text", place / "text.txt", "--seq-len", 64, "--max-blocks", 4, "--device", "cpu", "--json")
    small = command("evaluate", place / "small", "--against", place / "dense", *text).json
    assert small["bytes"] == report["file_bytes"] and small["perplexity"] > 1
    done = command("export", place / "small", tmp_path / "stock", "--dense", "--json")
    assert done.code == 0, done.err
    stock = command("evaluate", tmp_path / "stock", *text).json
    assert stock["perplexity"] == pytest.approx(small["perplexity"], rel=0.02)


def test_the_same_command_again_changes_nothing_and_another_run_gives_the_same_bytes(place, tmp_path):
    flags = ("--keep", 0.7, "--set", "groups=2", "--set", "least_atoms=1")
    with unchanged(place / "small"):
        again = compress(place, place / "small", *flags)
    assert again.code == 0 and "already complete" in again.err
    assert compress(place, tmp_path / "other", *flags).code == 0
    assert weights(tmp_path / "other") == weights(place / "small")


def test_an_interrupted_run_goes_on(place, tmp_path, monkeypatch):
    from cospadi.engine import compress as engine

    flags, solve, solved = ("--keep", 0.7, "--set", "groups=2", "--set", "least_atoms=1"), engine.factorise_group, []

    def stop(context, group):
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append(group)
        return solve(context, group)

    monkeypatch.setattr(engine, "factorise_group", stop)
    assert compress(place, tmp_path / "out", *flags).code == 130
    monkeypatch.setattr(engine, "factorise_group", solve)
    monkeypatch.setattr("cospadi.engine.allocate.atoms.search", None)  # the plan is taken over, not searched again
    done = compress(place, tmp_path / "out", *flags)
    assert done.code == 0 and "3 of 8 groups were already finished" in done.err
    assert weights(tmp_path / "out") == weights(place / "small")


def damaged(place, tmp_path, change):
    """A copy of the checkpoint in one file, its tensors or description changed."""
    out = tmp_path / "damaged"
    AutoModelForCausalLM.from_pretrained(place / "small").save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    name = change(tensors, config)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out, name


def shared_atoms(tensors):
    return next(name for name in tensors if name.endswith(".atoms"))


def fewer_atoms(tensors, config):
    name = shared_atoms(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    return name


def fewer_coefficients(tensors, config):
    name = shared_atoms(tensors).replace(".atoms", ".coefficients")
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    return name


def no_coefficients(tensors, config):
    name = shared_atoms(tensors).replace(".atoms", ".coefficients")
    del tensors[name]
    return name


def integer_atoms(tensors, config):
    name = shared_atoms(tensors)
    tensors[name] = tensors[name].to(torch.int16)
    return name


def other_rank(tensors, config):
    name = next(name for name in tensors if name.endswith(".down"))
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    return name


def dense_beside(tensors, config):
    name = shared_atoms(tensors).replace(".atoms", ".dense")
    tensors[name] = torch.zeros(2)
    return name


@pytest.mark.parametrize(
    "change", [fewer_atoms, fewer_coefficients, no_coefficients, integer_atoms, other_rank, dense_beside]
)
def test_atoms_and_coefficients_that_disagree_are_named(place, tmp_path, change):
    out, name = damaged(place, tmp_path, change)
    for read in (validate, cospadi.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            read(out)
        assert name in str(caught.value) and str(out) in str(caught.value)
    done = command("inspect", out)
    assert done.code == 1 and name in done.error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2 is unknown"),
        ({"groups": []}, "no groups"),
        ({"extra": 1}, "unknown keys"),
        ({"groups": [{"modules": ["a"]}]}, "group 0 of quantization_config is wrong"),
    ],
)
def test_descriptions_that_cannot_be_read(place, tmp_path, change, message):
    out, _ = damaged(place, tmp_path, lambda _, config: config["quantization_config"].update(change))
    for read in (validate, cospadi.load):
        with pytest.raises(CheckpointError, match=message):
            read(out)


def test_a_flipped_bit_is_noticed(place, tmp_path):
    out = tmp_path / "flipped"
    out.mkdir()
    for path in (place / "small").iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        cospadi.load(out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "groups=5"), "5 groups of 4 layers"),
        (("--set", "atoms=5"), "5 atoms for the 4 layers"),
        (("--set", "groups=4", "--set", "atoms=2"), "2 atoms for the 1 layers"),
        (("--set", "groups=2", "--set", "threshold=0.1"), "give one of the two"),
        (("--grouping", "siblings"), "grouping does not go with method 'masa'"),
        (("--allocation", "uniform"), "allocation does not go with"),
        (("--refine",), "refine does not go with"),
        (("--only", "query"), "'query' matches none of 28 linear layers"),
        (("--only", " , "), "names no module"),
        (("--keep", "0.01"), "least possible is"),
    ],
)
def test_wrong_settings_are_one_clear_line(place, tmp_path, flags, message):
    keep = () if "--keep" in flags else ("--keep", 0.7)
    done = compress(place, tmp_path / "out", *keep, *flags)
    assert done.code == 1 and message in done.error
    assert not (tmp_path / "out").exists()


def test_plan_and_target_size(place, tmp_path):
    plan = compress(place, tmp_path / "none", "--keep", 0.6, "--dry-run").json
    assert plan["keep_actual"] <= 0.6 and len(plan["groups"]) == 4 and plan["bytes_before"] == 13824
    assert not (tmp_path / "none").exists()


def test_target_size_holds_for_all_files(place, tmp_path):
    def reachable(target):
        return compress(place, tmp_path / "none", "--target-size", target, "--dry-run").code == 0

    high = sum(p.stat().st_size for p in (place / "dense").iterdir())
    target = next(size for size in range(high - 13824, high + 20_000, 1000) if reachable(size))
    assert not reachable(target - 1000)
    done = compress(place, tmp_path / "out", "--target-size", target + 3000)
    assert done.code == 0, done.err
    beside = {"report.json", "report.html", "README.md", "recipe.yaml", "SHA256SUMS"}
    files = [p for p in (tmp_path / "out").iterdir() if p.is_file() and p.name not in beside]
    assert target - 9000 < sum(p.stat().st_size for p in files) <= target + 3000


def test_only_restricts_any_method(place, tmp_path):
    flags = ("--keep", 0.6, "--only", "q_proj,layers.1.mlp", "--calibration", place / "text.txt", *FLAGS, "--json")
    for method in ("svd_llm", "masa"):
        done = command("compress", place / "dense", tmp_path / method, "--method", method, *flags)
        assert done.code == 0, done.err
        report = done.json
        modules = {name for group in report["groups"] for name in group["modules"]}
        assert modules == {f"model.layers.{i}.self_attn.q_proj" for i in range(4)} | {
            f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
        }
        assert report["bytes_before"] == 2 * (4 * 24 * 24 + 3 * 24 * 44) and report["keep_actual"] <= 0.6
        dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(place / "dense").parameters())
        assert report["parameters"] == dense
        assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / method)).isfinite().all()
    assert "only:\n- q_proj\n- layers.1.mlp\n" in (tmp_path / "masa" / "recipe.yaml").read_text()


def test_compare_shows_it_beside_others_on_the_same_layers(place, tmp_path):
    done = command(
        "compare", place / "dense", "--methods", "masa,svd_llm", "--keep", 0.7, "--only", ",".join(ATTENTION),
        "--references", "none", "--set", "masa.groups=2", "--text", place / "text.txt", "--eval-seq-len", 64,
        "--max-blocks", 4, "--calibration", place / "text.txt", *FLAGS, "--save", "--out", tmp_path / "c", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in done.json["rows"]}
    assert all(row["bytes_before"] == 13824 == done.json["dense"]["bytes"] for row in rows.values())
    assert all(row["keep_actual"] <= 0.7 and row["perplexity"] > 1 for row in rows.values())
    assert rows["masa"]["error"] < rows["svd_llm"]["error"]
    alone = command(
        "evaluate", tmp_path / "c" / "masa-0.7", "--text", place / "text.txt", "--seq-len", 64, "--max-blocks", 4,
        "--device", "cpu", "--json",
    ).json  # fmt: skip
    assert alone["perplexity"] == pytest.approx(rows["masa"]["perplexity"], rel=0.02)


def test_it_is_listed_and_not_compressed_twice(place, tmp_path):
    listed = {row["name"]: row for row in command("methods", "--json").json["methods"]}
    assert listed["masa"]["paper"] == "arXiv 2508.04581" and "groups" in listed["masa"]["options"]
    done = command(
        "compress", place / "small", tmp_path / "twice", "--keep", 0.5, "--calibration", place / "text.txt", *FLAGS
    )
    assert done.code == 1 and "already compressed" in done.error
