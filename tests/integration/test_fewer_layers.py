"""`from_pretrained(DIR, num_hidden_layers=N)`: as for dense checkpoints, absent layers are left out."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from cospadi import compress, prune
from cospadi.checkpoint import export_dense, load
from cospadi.errors import CheckpointError, ModelError
from tiny import save_tiny, tiny_text, token_ids

TEXTS = [tiny_text(6000)]
TEXT = {"calibration": {"samples": 8, "seq_len": 32}}
IDS = token_ids(2, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("layers") / "model", num_hidden_layers=4)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


RECIPES = {
    "single matrices": {"method": "svd", "keep": 0.7},
    "siblings": {"method": "pursuit", "keep": 0.7, "options": {"rounds": 2}},
    "integers": {"method": "rtn", "keep": 0.7},
    "across layers": {"method": "basis_sharing", "keep": 0.6},
    "two atoms for four layers": {"method": "masa", "keep": 0.7, "options": {"groups": 1, "atoms": 2}},
    "some layers": {"method": "svd", "keep": 0.7, "only": ["layers.1", "layers.3"]},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_compressed_model_of_fewer_layers_is_that_of_the_dense_export(model, tmp_path, recipe):
    compress(model, tmp_path / "small", recipe=TEXT | recipe, calibration=TEXTS)
    export_dense(tmp_path / "small", tmp_path / "dense", dtype="float32")
    options = {"num_hidden_layers": 3, "dtype": torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", **options)
    assert len(small.model.layers) == 3 and not hasattr(dense.config, "quantization_config")
    assert torch.allclose(logits(small), logits(dense), atol=1e-5)
    assert torch.equal(logits(load(tmp_path / "small", **options)), logits(small))
    assert torch.equal(logits(load(tmp_path / "small", compose=True, **options)), logits(dense))
    base = AutoModel.from_pretrained(tmp_path / "small", **options)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, small.model(IDS).last_hidden_state)
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", dtype=torch.float32)), logits(small))
    small.dequantize(dtype=torch.float32)
    assert torch.equal(logits(small), logits(dense))


def test_more_layers_are_new_ones_as_in_a_dense_checkpoint(model, tmp_path):
    compress(model, tmp_path / "small", recipe=TEXT | {"method": "svd", "keep": 0.7}, calibration=TEXTS)
    longer = AutoModelForCausalLM.from_pretrained(tmp_path / "small", num_hidden_layers=5)
    assert type(longer.model.layers[3].mlp.up_proj) is not type(longer.model.layers[4].mlp.up_proj)
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.4"):
        load(tmp_path / "small", num_hidden_layers=5)


def test_a_configuration_that_says_fewer_layers_is_still_a_damaged_checkpoint(model, tmp_path):
    compress(model, tmp_path / "small", recipe=TEXT | {"method": "svd", "keep": 0.7}, calibration=TEXTS)
    config = tmp_path / "small/config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.3"):
        load(tmp_path / "small")


@pytest.mark.parametrize(
    ("layers", "recipe"),
    [
        (2, {"method": "masa", "keep": 0.7, "options": {"groups": 1, "atoms": 2}}),
        (1, {"method": "svd", "keep": 0.7, "only": ["layers.3"]}),
    ],
)
def test_layers_that_cannot_be_left_out_say_so(model, tmp_path, layers, recipe):
    compress(model, tmp_path / "small", recipe=TEXT | recipe, calibration=TEXTS)
    with pytest.raises(ModelError, match=r"load all layers|ask for more") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", num_hidden_layers=layers)
    assert "\n" not in str(caught.value)


def test_narrowed_layers(model, tmp_path):
    prune(model, tmp_path / "narrow", method="llm_pruner", keep_blocks=0.7, recipe=TEXT, calibration=TEXTS)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", num_hidden_layers=3)
    del whole.model.layers[3]
    assert len(short.model.layers) == 3
    assert torch.equal(logits(short), logits(whole))
    short.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(short))


def test_sliced_layers_are_refused(model, tmp_path):
    prune(model, tmp_path / "sliced", method="slicegpt", keep_blocks=0.8, recipe=TEXT, calibration=TEXTS)
    with pytest.raises(ModelError, match="load all layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", num_hidden_layers=3)


def test_linear_maps_in_the_place_of_layers(model, tmp_path):
    options = {"separate": True}
    prune(model, tmp_path / "cut", method="replaceme", blocks=1, options=options, recipe=TEXT, calibration=TEXTS)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    at = next(i for i, layer in enumerate(whole.model.layers) if type(layer).__name__ == "LinearBlock")
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", num_hidden_layers=at + 1)
    del whole.model.layers[at + 1 :]
    assert torch.equal(logits(short), logits(whole))
