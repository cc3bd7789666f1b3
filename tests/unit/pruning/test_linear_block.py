import copy
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from cospadi.checkpoint import load
from cospadi.checkpoint.formats.linear_blocks import LINEAR_BLOCKS
from cospadi.errors import CheckpointError
from cospadi.layers.linear_block import LinearBlock
from cospadi.model_view import discover_layers
from cospadi.pruning import Cut, Evidence, Tokens, get_pruning_method
from tiny import token_ids
from unit.pruning.models import HYBRID, STANDARD, deep_model, generated, logits

IDS = token_ids(2, 20, seed=4)


def separate(model, runs):
    """The model with random transforms in the place of runs, and the same by hooks on the whole model."""
    transforms = {first: torch.eye(24) + 0.2 * torch.randn(24, 24) for first, _ in runs}
    removed = tuple(index for run in runs for index in range(*run))
    whole = copy.deepcopy(model)
    layers = discover_layers(whole).layers
    for first, stop in runs:
        for index in range(first, stop):
            matrix = transforms[first] if index == first else torch.eye(24)
            layers[index].forward = lambda hidden_states, *_, _t=matrix, **__: hidden_states @ _t
    expected = logits(whole, IDS)
    return Cut(removed, {}, transforms).apply(discover_layers(model)), expected


CASES = [(name, [(2, 5)]) for name in STANDARD]
CASES += [(name, runs) for name in HYBRID for runs in ([(1, 2)], [(2, 3)], [(3, 5)])]
CASES += [(name, runs) for name in ("llama", "gemma3_text") for runs in ([(1, 3)], [(1, 2), (3, 5)])]


@pytest.mark.parametrize(("architecture", "runs"), CASES, ids=str)
def test_a_linear_block_maps_the_hidden_state_and_loads_natively(architecture, runs, tmp_path):
    made, expected = separate(deep_model(architecture), runs)
    torch.testing.assert_close(logits(made, IDS), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(made, IDS, True), generated(made, IDS, False))
    made.save_pretrained(tmp_path)
    for read in (AutoModelForCausalLM.from_pretrained, load):
        loaded = read(tmp_path)
        assert torch.equal(logits(loaded, IDS), logits(made, IDS))
        assert torch.equal(generated(loaded, IDS, True), generated(made, IDS, False))
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again, IDS), logits(made, IDS))
    assert sum(isinstance(module, LinearBlock) for module in again.modules()) == len(runs)


def test_it_loads_as_a_bare_decoder_and_in_sixteen_bits(tmp_path):
    made, _ = separate(deep_model(), [(1, 3)])
    made.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert sum(isinstance(module, LinearBlock) for module in bare.modules()) == 1
    short = load(tmp_path, dtype=torch.bfloat16)
    block = next(module for module in short.modules() if isinstance(module, LinearBlock))
    assert block.weight.dtype == torch.bfloat16
    assert bool(logits(short, IDS).isfinite().all())


def test_replaceme_with_a_separate_block_is_the_best_map_of_the_hidden_state():
    model = deep_model("gemma2")
    found = Evidence(discover_layers(model), Tokens(token_ids(16, 24, seed=9)))
    cut = get_pruning_method("replaceme").remove(
        found, 2, {"separate": True, "ridge": 0.0, "start": 2, "relative": False}
    )
    with found.walk(found.tokens, "states") as batches:
        states = [(s[2].flatten(0, 1).double(), s[4].flatten(0, 1).double()) for s, _ in batches]
    x, y = (torch.cat(parts) for parts in zip(*states, strict=True))
    expected = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(cut.separate[2], expected, rtol=1e-3, atol=1e-4)
    assert not cut.weights and cut.facts()["transforms"][0]["into"] is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"format_version": 2, "blocks": []}, "format version 2"),
        ({"format_version": 1, "blocks": []}, "'blocks'"),
        ({"format_version": 1, "blocks": [{"name": "x", "width": "24", "guard": "y", "extra_outputs": None}]}, "width"),
        ({"format_version": 1, "blocks": ["x"]}, "name"),
    ],
)
def test_a_bad_configuration_is_named(data, said):
    with pytest.raises(CheckpointError, match=said):
        LINEAR_BLOCKS.parse({"quant_method": LINEAR_BLOCKS.name} | data)


def test_a_configuration_of_another_model_is_named(tmp_path):
    made, _ = separate(deep_model(), [(1, 3)])
    made.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key, value, said in (
        ("name", "model.layers.9", "layers.9"),
        ("guard", "mlp.none.weight", "mlp.none"),
        ("width", 23, r"layers\.1\.weight is .* expected .* \[23, 23\]"),
    ):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["blocks"][0][key] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path)
