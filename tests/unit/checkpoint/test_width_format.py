"""The description of width-pruned checkpoints: what is written is read, and everything else is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cospadi.checkpoint import load, validate
from cospadi.checkpoint.formats.width import (
    WIDTH,
    BlockShape,
    LinearShape,
    WidthSpec,
    attach_width,
    describe_width,
)
from cospadi.errors import CheckpointError, ModelError
from cospadi.layers.sliced import BlockParts
from cospadi.model_view import skeleton
from tiny import tiny_model

PARTS = BlockParts("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
SPEC = WidthSpec(
    {
        "model.layers.0.self_attn.q_proj": LinearShape(16, 24, True),
        "model.layers.0.self_attn.k_proj": LinearShape(16, 12, False),
        "model.layers.0.self_attn.v_proj": LinearShape(16, 12, False),
        "model.layers.0.self_attn.o_proj": LinearShape(24, 8, False),
        "model.layers.0.mlp.gate_proj": LinearShape(8, 44, False),
        "model.layers.0.mlp.up_proj": LinearShape(8, 44, False),
        "model.layers.2.mlp.down_proj": LinearShape(40, 24, False),
        "model.layers.2.mlp.up_proj": LinearShape(24, 40, False),
        "model.layers.2.mlp.gate_proj": LinearShape(24, 40, False),
    },
    {"model.embed_tokens": 16},
    {"model.layers.0": BlockShape(PARTS, (16, 8, 24), 24, (1e-6, 1e-5))},
)


def narrowed():
    model = tiny_model()
    WIDTH.replace(model, [SPEC])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def saved(tmp_path):
    attach_width(narrowed()).save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def test_description_round_trip():
    assert WIDTH.parse(WIDTH.describe([SPEC])) == (SPEC,)
    assert describe_width(narrowed()) == SPEC
    meta = skeleton(tiny_model().config)
    WIDTH.replace(meta, [SPEC])
    assert describe_width(meta) == SPEC and all(p.is_meta for p in meta.parameters())


def test_a_stock_model_is_not_marked():
    model = tiny_model("qwen2", tie_word_embeddings=True)
    assert not describe_width(model)
    assert attach_width(model) is model and not hasattr(model.config, "quantization_config")


def test_other_changes_are_refused():
    model = tiny_model("qwen3")
    model.model.layers[0].self_attn.q_norm.weight = nn.Parameter(torch.ones(5))
    with pytest.raises(ModelError, match=r"q_norm\.weight is \(5,\), its configuration says \(6,\)"):
        describe_width(model)
    model = tiny_model()
    model.model.layers[1].extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ModelError, match=r"layers\.1\.extra"):
        describe_width(model)


def test_replace_names_what_is_missing():
    with pytest.raises(ModelError, match=r"layers\.9\.mlp: the model LlamaForCausalLM has no such module"):
        WIDTH.replace(tiny_model(), [WidthSpec({"layers.9.mlp": LinearShape(1, 1, False)})])
    with pytest.raises(ModelError, match="expected Linear"):
        WIDTH.replace(tiny_model(), [WidthSpec({"model.norm": LinearShape(1, 1, False)})])
    parts = BlockParts("input_layernorm", "attention", "post_attention_layernorm", "mlp")
    with pytest.raises(ModelError, match=r"layers\.0\.attention"):
        WIDTH.replace(
            tiny_model(), [WidthSpec(blocks={"model.layers.0": BlockShape(parts, (8, 8, 8), 24, (1e-6, 1e-6))})]
        )


DAMAGE = {
    "another method": lambda d: d.update(quant_method="cospadi"),
    "version": lambda d: d.update(format_version=2),
    "version type": lambda d: d.update(format_version=True),
    "unknown key": lambda d: d.update(more=1),
    "no table": lambda d: d.pop("blocks"),
    "table is a list": lambda d: d.update(linears=[1]),
    "nothing": lambda d: d.update(linears={}, embeddings={}, blocks={}),
    "size zero": lambda d: d["embeddings"].update({"model.embed_tokens": 0}),
    "size text": lambda d: d["linears"]["model.layers.2.mlp.up_proj"].update(inputs="24"),
    "bias": lambda d: d["linears"]["model.layers.2.mlp.up_proj"].update(bias=1),
    "module name": lambda d: d["linears"].update({"../up": {"inputs": 1, "outputs": 1, "bias": False}}),
    "child name": lambda d: d["blocks"]["model.layers.0"].update(mixer="self_attn.q_proj"),
    "child twice": lambda d: d["blocks"]["model.layers.0"].update(mixer="mlp"),
    "widths": lambda d: d["blocks"]["model.layers.0"].update(widths=[16, 8]),
    "full width": lambda d: d["blocks"]["model.layers.0"].pop("full_width"),
    "eps": lambda d: d["blocks"]["model.layers.0"].update(eps=[1e-6, 7.0]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_impossible_descriptions_are_refused(damage):
    data = copy.deepcopy(WIDTH.describe([SPEC]))
    DAMAGE[damage](data)
    with pytest.raises(CheckpointError, match=r"^here/config\.json: ") as caught:
        WIDTH.parse(data, "here/config.json")
    assert "\n" not in str(caught.value)
    for nonsense in (None, [], "cospadi_width"):
        with pytest.raises(CheckpointError):
            WIDTH.parse(nonsense)


def test_headers_are_checked(saved):
    assert validate(saved) == (SPEC,)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.self_attn.o_proj.weight", lambda t: t[:, :-1].contiguous()),
        ("model.layers.0.self_attn.q_proj.bias", lambda t: None),
        ("model.layers.0.mixer_shortcut.weight", lambda t: t.T.contiguous()),
        ("model.layers.0.mlp_shortcut.weight", lambda t: None),
        ("model.layers.0.input_layernorm.weight", lambda t: t.float()),
        ("model.layers.2.mlp.down_proj.weight", lambda t: t.to(torch.int32)),
        ("model.embed_tokens.weight", lambda t: torch.cat([t, t], 1)),
    ],
)
def test_damaged_tensors_are_named_with_their_file(tmp_path, name, change):
    from safetensors.torch import load_file, save_file

    attach_width(narrowed()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        validate(tmp_path)
    assert name in str(caught.value) and str(tmp_path) in str(caught.value)


STORED = sorted(path.parent for path in (Path(__file__).parents[2] / "checkpoints").glob("width_v*/*/config.json"))


def test_stored_checkpoints_are_there():
    assert {f"{path.parent.name}/{path.name}" for path in STORED} >= {"width_v1/sliced", "width_v1/channels"}


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_stored_checkpoints_load_as_they_were(path):
    expected = json.loads((path / "expected.json").read_text())
    assert validate(path) == WIDTH.parse(expected["spec"])
    model = load(path)
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits.float()
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0.02, atol=0.05)


def test_a_bias_too_many_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    attach_width(narrowed()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(12)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model\.layers\.0\.self_attn\.k_proj\.bias"):
        validate(tmp_path)
