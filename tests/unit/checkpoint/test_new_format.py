"""A stored format that the package does not know is added in one file, and everything works with it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from cospadi import evaluation
from cospadi.checkpoint import FORMATS, export_dense, factor_bytes, format_for, load, save, validate
from cospadi.errors import CheckpointError, RecipeError
from tiny import byte_tokenizer, tiny_model

SOURCE = Path(__file__).parents[2] / "checkpoints" / "eight_bit.py"
ids = torch.arange(12)[None]


@pytest.fixture
def eight_bit():
    """The names of the module, whose format is registered for the length of a test."""
    with FORMATS.temporary():
        yield runpy.run_path(str(SOURCE))
    assert "eight_bit" not in FORMATS.all()


def logits(model):
    with torch.no_grad():
        return model(ids).logits


def make(kind, out, dtype=torch.bfloat16):
    """A checkpoint of a tiny model whose attention is stored in the format; the model."""
    model = tiny_model("qwen2", dtype=dtype)
    names = [name for name, module in model.named_modules() if name.endswith(("q_proj", "o_proj"))]
    specs, weights = [], [model.get_submodule(name).weight.detach().float() for name in names]
    for name, weight in zip(names, weights, strict=True):
        specs.append(kind["EightBit"]((name,), weight.shape[1], weight.shape[0]))
    format_for(specs).replace(model, specs)
    for spec, weight in zip(specs, weights, strict=True):
        scales = weight.abs().amax(1, keepdim=True) / 127
        format_for(spec).install(
            model, spec, {"0.levels": (weight / scales).round().to(torch.int8), "0.scales": scales.to(torch.bfloat16)}
        )
    save(model, byte_tokenizer(), out, specs, max_shard_size="20KB")
    return model, specs


def test_it_takes_under_forty_lines():
    lines = SOURCE.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("@dataclass"))
    assert sum(bool(line.strip()) for line in lines[begin:]) < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_loaded_inspected_and_exported(eight_bit, tmp_path, dtype):
    model, specs = make(eight_bit, tmp_path / "c", dtype)
    expected, dense = logits(model), logits(tiny_model("qwen2", dtype=dtype))
    torch.testing.assert_close(expected, dense, rtol=0.05, atol=0.25)
    assert validate(tmp_path / "c") == tuple(specs)
    for read in (AutoModelForCausalLM.from_pretrained, load):
        assert torch.equal(logits(read(tmp_path / "c")), expected)
    bare = AutoModel.from_pretrained(tmp_path / "c")
    assert type(bare.layers[0].self_attn.q_proj) is eight_bit["EightBitLinear"]
    seen = evaluation.inspect(tmp_path / "c")
    assert seen["bytes_after"] == factor_bytes(tmp_path / "c") and seen["keep_actual"] < 0.6
    assert [row["name"] for row in seen["groups"]] == [spec.modules[0] for spec in specs]
    export_dense(tmp_path / "c", tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(stock.config, "quantization_config")
    torch.testing.assert_close(logits(stock), expected, rtol=1e-3, atol=0.01)
    again, _ = evaluation.load(tmp_path / "c", compose=True)
    assert type(again.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.levels"), "levels is missing"),
        (lambda tensors, name: tensors.pop(f"{name}.weight"), "weight is missing"),
        (lambda tensors, name: tensors.update({f"{name}.levels": torch.zeros(3, 3)}), "levels is torch.float32"),
        (lambda tensors, name: tensors.update({f"{name}.more": torch.zeros(3)}), "more does not belong"),
    ],
)
def test_damage_is_named(eight_bit, tmp_path, change, message):
    model, specs = make(eight_bit, tmp_path)
    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    change(tensors, specs[0].modules[0])
    save_file(tensors, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    for read in (load, validate, AutoModelForCausalLM.from_pretrained, evaluation.inspect):
        with pytest.raises(CheckpointError, match=f"tensor {specs[0].modules[0]}.{message}"):
            read(tmp_path / "one")


def test_an_unregistered_format_is_refused(tmp_path):
    with FORMATS.temporary():
        make(runpy.run_path(str(SOURCE)), tmp_path)
    for read in (AutoModelForCausalLM.from_pretrained, validate, load, evaluation.inspect):
        with pytest.raises(CheckpointError):
            read(tmp_path)


def test_specs_without_a_format_are_refused(eight_bit):
    with pytest.raises(ValueError, match="no checkpoint format stores a str"):
        format_for("text")
    with pytest.raises(ValueError, match="one type"):
        format_for([])
    with pytest.raises(RecipeError, match="did you mean 'eight_bit'"):
        FORMATS.get("eight_bits")


PLUG_IN = """
import json, sys, torch
{first}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
kind = type(model.model.layers[0].self_attn.q_proj).__name__
with torch.no_grad():
    print(json.dumps([kind, model(torch.arange(12)[None]).logits.float().sum().item()]))
"""


def run_with_plug_in(place, module, *arguments, first=""):
    """A fresh interpreter in an environment where a package is installed that has an entry point of our group."""
    (place / "another-1.dist-info").mkdir(parents=True)
    (place / "another-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1\n")
    (place / "another-1.dist-info" / "entry_points.txt").write_text("[cospadi.formats]\neight_bit = another_format\n")
    (place / "another_format.py").write_text(module)
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", PLUG_IN.format(first=first), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=str(Path(sys.prefix)),
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("first", ["", "import transformers.modeling_utils", "import cospadi.checkpoint"])
def test_an_entry_point_is_enough(eight_bit, tmp_path, first):
    model, _ = make(eight_bit, tmp_path / "c")
    done = run_with_plug_in(tmp_path / "site", SOURCE.read_text(), tmp_path / "c", first=first)
    assert done.returncode == 0, done.stderr
    kind, total = json.loads(done.stdout)
    assert kind == "EightBitLinear" and total == pytest.approx(logits(model).float().sum().item(), rel=1e-3)


def test_a_plug_in_may_need_the_model_classes_of_transformers(eight_bit, tmp_path):
    make(eight_bit, tmp_path / "c")
    module = "from transformers import PreTrainedModel\n" + SOURCE.read_text()
    done = run_with_plug_in(tmp_path / "site", module, tmp_path / "c")
    assert done.returncode == 0 and json.loads(done.stdout)[0] == "EightBitLinear", done.stderr


def test_a_broken_plug_in_takes_nothing_else_away(tmp_path):
    stored = Path(__file__).parents[2] / "checkpoints" / "v1" / "tied_float16"
    done = run_with_plug_in(tmp_path / "site", "raise ImportError('no such library')\n", stored)
    assert "plug-in eight_bit: ImportError: no such library" in done.stderr
    assert done.returncode == 0 and json.loads(done.stdout)[0] == "FactoredLinear", done.stderr
