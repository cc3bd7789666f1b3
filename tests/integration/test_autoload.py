"""A compressed checkpoint in other processes: read by transformers by itself, and refused without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from checkpoints.factory import compress_randomly
from cospadi.checkpoint import export_dense, save
from tiny import byte_tokenizer, tiny_model

ids = torch.arange(30).reshape(2, 15)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("c") / "c"
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    save(model, byte_tokenizer(), directory, compress_randomly(model), max_shard_size="20KB")
    with torch.no_grad():
        return directory, model(ids).logits


def run(code, *arguments, **environment):
    """A fresh interpreter, outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=str(Path(sys.prefix)),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
    )


STOCK = """
import sys, torch
sys.modules["cospadi"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("loaded", [float(v) for v in model(torch.arange(30).reshape(2, 15)).logits.float().mean(-1).flatten()])
"""


def test_without_the_package_loading_fails_loudly(checkpoint):
    done = run(STOCK, checkpoint[0], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "Unknown quantization type, got cospadi" in done.stderr and "mismatch" in done.stderr


def test_export_loads_without_the_package(checkpoint, tmp_path):
    directory, before = checkpoint
    export_dense(directory, tmp_path / "dense", max_shard_size="20KB")
    assert torch.equal(
        torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "dense")("abc").input_ids]),
        torch.tensor([AutoTokenizer.from_pretrained(directory)("abc").input_ids]),
    )
    done = run(STOCK, tmp_path / "dense", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    got = torch.tensor(json.loads(done.stdout.removeprefix("loaded"))).view(2, 15)
    torch.testing.assert_close(got, before.float().mean(-1), rtol=0.02, atol=0.02)


NATIVE = """
import sys
{first}
import torch
{second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [("", ""), ("import transformers.quantizers", ""), ("import transformers.modeling_utils", "")],
    ids=["torch", "quantizers", "modeling"],
)
def test_by_itself_in_any_import_order(checkpoint, first, second):
    done = run(NATIVE.format(first=first, second=second), checkpoint[0])
    assert done.stdout.strip() == "FactoredLinear", done.stderr
    assert "will not read" not in done.stderr


@pytest.mark.parametrize(
    "second", ["import transformers.modeling_utils, cospadi", "import cospadi"], ids=["after", "before"]
)
def test_by_import_of_the_package(checkpoint, second):
    done = run(NATIVE.format(first="", second=second), checkpoint[0], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.strip() == "FactoredLinear", done.stderr


def test_off_switch(checkpoint):
    code = NATIVE.format(first="", second="import sys; assert not any('cospadi' in str(f) for f in sys.meta_path)")
    done = run(code, checkpoint[0], COSPADI_AUTOLOAD="0")
    assert done.returncode != 0 and "mismatch" in done.stderr


PEFT = """
import sys
exec(sys.argv[1])
import torch, peft
from peft.tuners.tuners_utils import BaseTuner
print("extended", "cospadi.integrations.peft" in sys.modules, hasattr(BaseTuner, "_cospadi_extended"))
"""


@pytest.mark.parametrize(
    "first", ["import peft", "import torch", "import transformers", "from peft.tuners.lora import LoraConfig"]
)
def test_peft_is_extended_in_any_import_order(first):
    done = run(PEFT, first)
    assert done.returncode == 0 and "extended True True" in done.stdout, done.stderr


def test_the_off_switch_leaves_peft_alone():
    done = run(PEFT, "import torch", COSPADI_AUTOLOAD="0")
    assert done.returncode == 0 and "extended False False" in done.stdout, done.stderr


def test_costs_nothing_without_transformers():
    done = run("import torch, sys; print([m for m in sys.modules if m.split('.')[0] in ('cospadi', 'transformers')])")
    assert done.stdout.strip() == "[]", done.stderr


def test_a_broken_package_does_not_break_torch_or_transformers():
    code = "import sys; sys.modules['cospadi'] = None\nimport torch, transformers.modeling_utils\nprint('alive')"
    done = run(code)
    assert done.stdout.strip() == "alive", done.stderr
    assert "will not read cospadi checkpoints" in done.stderr
