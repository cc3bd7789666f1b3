import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cospadi.errors import BudgetError, ModelError
from cospadi.model_view import discover_layers, skeleton
from cospadi.pruning.depth.surgery import Cut, runs, without_blocks
from tiny import tiny_config, token_ids
from unit.pruning.models import EXPERTS, HYBRID, STANDARD, deep_model, generated, logits, skipping

IDS = token_ids(2, 20, seed=4)
CASES = [(name, (0, 3)) for name in (*STANDARD, *EXPERTS)]
CASES += [(name, cut) for name in HYBRID for cut in ((0,), (2,), (1, 2), (0, 1, 3))]
CASES += [(name, cut) for name in ("llama", "gemma3_text") for cut in ((1,), (1, 2), (2, 4))]


@pytest.mark.parametrize(("architecture", "removed"), CASES, ids=str)
def test_what_is_left_computes_what_the_whole_does_without_the_blocks(architecture, removed, tmp_path):
    model = deep_model(architecture)
    view = discover_layers(model)
    expected = skipping(model, view.layers, removed, IDS)
    pruned = Cut(removed).apply(view)
    assert torch.equal(logits(pruned, IDS), expected)
    assert len(discover_layers(pruned).layers) == pruned.config.num_hidden_layers == 5 - len(removed)
    pruned.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(loaded, IDS), expected)
    # A block that kept its old index would write to another block's cache, or to none.
    assert torch.equal(generated(loaded, IDS, True), generated(loaded, IDS, False))
    assert torch.equal(generated(pruned, IDS, True), generated(loaded, IDS, False))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_every_block_knows_its_new_index(architecture):
    # Fault of the authors' code: blocks behind the cut looked up the cache by their old numbers.
    pruned = without_blocks(discover_layers(deep_model(architecture)), (1, 3))
    for place, layer in enumerate(pruned.layers):
        indices = {v for m in layer.modules() for k, v in vars(m).items() if k == "layer_idx"}
        assert indices == {place}


@pytest.mark.parametrize("architecture", ["gemma3_text", *HYBRID])
def test_lists_with_an_entry_per_block_are_cut_too(architecture):
    model = deep_model(architecture)
    kinds = list(model.config.layer_types)
    pruned = without_blocks(discover_layers(model), (0, 3))
    assert pruned.model.config.layer_types == [kinds[1], kinds[2], kinds[4]]


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("mlp_only_layers", [0, 2, 4], [1, 2]),  # names blocks
        ("full_attn_idxs", [0, 1, 2, 3, 4], [0, 1, 2]),  # names all of them
        ("no_rope_layers", [1, 0, 1, 1, 0], [0, 1, 0]),  # one flag per block
        ("indexer_types", ["a", "b", "c", "d", "e"], ["b", "c", "e"]),
        ("eos_token_id", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),  # nothing to do with blocks
        ("mlp_only_layers", [], []),
    ],
)
def test_lists_of_the_configuration_follow_the_cut(key, before, after):
    model = skeleton(tiny_config("llama", num_hidden_layers=5, **{key: before}))
    config = without_blocks(discover_layers(model), (0, 3)).model.config
    assert getattr(config, key) == after and config.num_hidden_layers == 3


def test_a_model_on_meta_is_cut_without_any_weight():
    config = tiny_config("qwen3", num_hidden_layers=6)
    pruned = without_blocks(discover_layers(skeleton(config)), (2, 3))
    assert pruned.model.config.num_hidden_layers == len(pruned.layers) == 4
    assert next(pruned.model.parameters()).device.type == "meta"


def test_a_block_that_depends_on_its_place_is_refused():
    model = deep_model("llama")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda block, _, out: out * (1 + block.self_attn.layer_idx))
    with pytest.raises(ModelError, match="compute something else"):
        without_blocks(discover_layers(model), (1,))


def test_a_configuration_that_cannot_say_what_is_left_is_refused():
    model = deep_model("gpt2", scale_attn_by_inverse_layer_idx=True)  # every block's scale follows from its place
    with pytest.raises(ModelError, match=r"attn\.scaling of block 1 would change"):
        without_blocks(discover_layers(model), (1,))
    without_blocks(discover_layers(deep_model("gpt2", scale_attn_by_inverse_layer_idx=True)), (3, 4))


def test_a_configuration_that_counts_its_blocks_twice_is_cut():
    config = tiny_config("xlstm", num_hidden_layers=5, num_blocks=5, num_heads=4)
    pruned = without_blocks(discover_layers(skeleton(config)), (0, 3))
    assert len(pruned.layers) == pruned.model.config.num_blocks == pruned.model.config.num_hidden_layers == 3


def test_a_count_of_blocks_that_does_not_follow_is_refused():
    class Fixed(LlamaConfig):
        """A configuration that is read back with five blocks, whatever is stored."""

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            return super().from_dict(config_dict | {"num_hidden_layers": 5}, **kwargs)

    model = deep_model()
    model.config.__class__ = Fixed
    with pytest.raises(ModelError, match="transformers builds 5 blocks of it, not 4"):
        without_blocks(discover_layers(model), (1,))


@pytest.mark.parametrize("architecture", HYBRID)
def test_a_hybrid_model_keeps_a_block_with_attention(architecture):
    # transformers' cache has no length without one, so that generate would fail
    model = deep_model(architecture)
    with pytest.raises(ModelError, match="generation with a cache fails"):
        without_blocks(discover_layers(model), (2, 4))


@pytest.mark.parametrize("chance", [1, 4])
def test_an_attribute_that_equals_the_index_by_chance_is_left_alone(chance):
    model = deep_model("lfm2")
    layers = discover_layers(model).layers
    layers[chance].get_submodule("conv" if chance == 1 else "self_attn").stride = chance
    pruned = without_blocks(discover_layers(model), (0,))
    (kept,) = [module for module in pruned.model.modules() if "stride" in vars(module) and type(module.stride) is int]
    assert kept.stride == chance


def test_a_configuration_that_reads_back_otherwise_is_refused():
    # Gemma 4 makes the last block one of full attention when its configuration is read, whatever is stored there
    model = deep_model("gemma4_text")
    with pytest.raises(ModelError, match="transformers turns layer_types"):
        without_blocks(discover_layers(model), (2, 4))


@pytest.mark.parametrize("removed", [(5,), (-1,), (0, 1, 2, 3, 4)])
def test_blocks_that_are_not_there_or_all_of_them_are_refused(removed):
    with pytest.raises(BudgetError, match="of 5"):
        without_blocks(discover_layers(deep_model()), removed)


def test_weights_are_written_in_the_dtype_of_the_model_under_their_old_names():
    model = deep_model(dtype=torch.bfloat16)
    name = "model.layers.3.mlp.down_proj.weight"
    value = torch.randn(24, 44, dtype=torch.float64)
    untouched = copy.deepcopy(model.model.layers[4].state_dict())
    pruned = Cut((1, 2), {name: value}).apply(discover_layers(model))
    assert torch.equal(pruned.model.layers[1].mlp.down_proj.weight, value.bfloat16())
    assert all(torch.equal(v, untouched[k]) for k, v in pruned.model.layers[2].state_dict().items())


def test_runs_are_stretches_of_neighbours():
    assert runs([4, 1, 2, 7, 5]) == [[1, 3], [4, 6], [7, 8]]
    assert runs([]) == []
