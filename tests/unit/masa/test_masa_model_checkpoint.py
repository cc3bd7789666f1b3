"""Saving and loading models with shared attention; damaged checkpoints stop loudly."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from cospadi.checkpoint.load import load
from cospadi.errors import CheckpointError, RecipeError
from cospadi.masa import MasaConfig, MasaForCausalLM
from tiny import byte_tokenizer, token_ids

ids = token_ids(2, 16)


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A folded model, the logits before saving, and its directory."""
    directory = tmp_path_factory.mktemp("masa") / "m"
    torch.manual_seed(0)
    config = MasaConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    model = MasaForCausalLM(config).eval()
    model.fold()
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    with torch.no_grad():
        return directory, model(ids).logits, model


@pytest.fixture
def copied(folded, tmp_path):
    shutil.copytree(folded[0], tmp_path / "c")
    return tmp_path / "c"


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory, **fields):
    data = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(data | fields))


@torch.no_grad()
def test_a_folded_checkpoint_holds_atoms_and_coefficients_only(folded):
    directory, logits, _ = folded
    tensors = load_file(directory / "model.safetensors")
    of_attention = [name for name in tensors if "attention." in name or "attn" in name]
    attention = {name: tuple(tensors[name].shape) for name in of_attention}
    assert attention == {
        f"model.shared_attention.{name}.{part}": shape
        for name in "qkvo"
        for part, shape in (("atoms", (2, 24, 24)), ("coefficients", (6, 2)))
    }
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert type(loaded) is MasaForCausalLM and not loaded.training
    assert torch.equal(loaded(ids).logits, logits)


@torch.no_grad()
def test_composed_at_load_or_at_every_call(folded):
    directory, logits, model = folded
    fast = AutoModelForCausalLM.from_pretrained(directory, compose_weights=True)
    assert fast.model.layers[3].self_attn.q_proj.composed.shape == (24, 24)
    assert torch.equal(fast(ids).logits, logits)
    assert set(fast.state_dict()) == set(model.state_dict())
    small = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert small.model.layers[3].self_attn.q_proj.composed is None
    quick = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, compose_weights=True)
    assert quick(ids).logits.dtype == torch.bfloat16 and torch.equal(quick(ids).logits, small(ids).logits)


@torch.no_grad()
def test_saved_again_a_composed_model_is_the_same_checkpoint(folded, tmp_path):
    directory, logits, _ = folded
    AutoModelForCausalLM.from_pretrained(directory, compose_weights=True).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, logits)


@torch.no_grad()
def test_unfolded_checkpoints_keep_the_network(tmp_path):
    torch.manual_seed(1)
    model = MasaForCausalLM(
        MasaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.shared_attention["q"].network is not None
    small = token_ids(1, 5) % 30
    assert torch.equal(loaded(small).logits, model(small).logits)
    loaded.fold()
    assert (
        loaded.config.folded and loaded.model.config.folded and torch.equal(loaded(small).logits, model(small).logits)
    )


@torch.no_grad()
def test_other_ways_in(folded, tmp_path):
    directory, logits, model = folded
    assert type(AutoConfig.from_pretrained(directory)) is MasaConfig
    decoder = AutoModel.from_pretrained(directory)
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert torch.equal(load(directory)(ids).logits, logits)
    model.to_llama().save_pretrained(tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is LlamaForCausalLM and stock.config.tie_word_embeddings
    torch.testing.assert_close(stock(ids).logits, logits)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_tensor(name, value):
    return lambda tensors: tensors.update({name: value})


Q = "model.shared_attention.q."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_tensor(Q + "coefficients", torch.zeros(6, 3)),
            r"q.coefficients is \[6, 3\].*configuration says \[6, 2\]",
        ),
        (with_tensor(Q + "atoms", torch.zeros(3, 24, 24)), r"q.atoms is \[3, 24, 24\].*says \[2, 24, 24\]"),
        (with_tensor(Q + "network.last_bias", torch.zeros(2)), "network.last_bias is not part"),
        (without(Q + "coefficients"), "q.coefficients is missing"),
        (without("model.norm.weight"), "model.norm.weight is missing"),
        (with_tensor("model.norm.weight", torch.zeros(3)), "model.norm.weight is"),
    ],
)
def test_weights_that_do_not_fit_name_file_and_tensor(copied, change, message):
    edit_tensors(copied, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(copied)
    assert str(copied) in str(caught.value)
    if "missing" not in message:
        assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"num_atoms": 3}, CheckpointError),
        ({"folded": False}, CheckpointError),
        ({"attention_sharing": "repeat"}, CheckpointError),
        ({"attention_sharing": "dense"}, CheckpointError),
        ({"num_hidden_layers": 5}, CheckpointError),
        ({"num_atoms": 8}, RecipeError),
    ],
)
def test_a_configuration_that_does_not_fit(copied, fields, error):
    edit_config(copied, **fields)
    with pytest.raises(error):
        AutoModelForCausalLM.from_pretrained(copied)


def test_mismatched_sizes_may_be_ignored_outside_the_shared_matrices(copied):
    edit_tensors(copied, with_tensor("model.norm.weight", torch.zeros(3)))
    model, report = AutoModelForCausalLM.from_pretrained(copied, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, *_ in report["mismatched_keys"]] == ["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, torch.ones(24))
    edit_tensors(copied, with_tensor(Q + "coefficients", torch.zeros(6, 3)))
    with pytest.raises(CheckpointError, match="coefficients"):
        AutoModelForCausalLM.from_pretrained(copied, ignore_mismatched_sizes=True)


def small(design="masa", **fields):
    sizes = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 6}
    tied = {"tie_word_embeddings": True}
    return MasaForCausalLM(MasaConfig(**sizes, **tied, num_attention_heads=4, attention_sharing=design, **fields))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"design": "repeat"}, r"'repeat'.*k.network.embedding is not part"),
        ({"design": "repeat"}, {}, r"'masa'.*k.network.embedding is missing"),
        ({}, {"design": "dense"}, r"'dense'.*q_proj.weight is missing|'dense'.*k_proj.weight is missing"),
        ({"design": "dense"}, {}, "k_proj.weight is not part"),
        ({"design": "dense"}, {"design": "low_rank"}, "k_proj.down is missing"),
        ({}, {"folded": True}, r"folded True.*k.coefficients is missing"),
        ({"folded": True}, {}, r"folded False.*k.coefficients is not part"),
        ({}, {"shared_types": ["q", "k", "v"]}, r"\['q', 'k', 'v'\].*o_proj.weight is missing"),
    ],
)
def test_a_state_of_another_design_is_refused_where_leniency_is_asked_for(before, now, message):
    """As transformers' Trainer does, which would go on with a random attention."""
    state = {name: value for name, value in small(**before).state_dict().items() if not name.startswith("lm_head")}
    with pytest.raises(CheckpointError, match=message):
        small(**now).load_state_dict(state, strict=False)


def test_states_of_parts_are_loaded_where_leniency_is_asked_for():
    source, target = small(), small()
    state = source.state_dict()
    names = sorted(state)
    for shard in (names[::2], names[1::2]):
        target.load_state_dict({name: state[name] for name in shard}, strict=False)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    found = target.load_state_dict({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, strict=False)
    assert len(found.unexpected_keys) == 1
