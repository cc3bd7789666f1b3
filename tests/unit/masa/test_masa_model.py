"""The language model with shared attention: function, exact counts, designs, folding, composing, generation."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from cospadi.errors import ModelError, RecipeError
from cospadi.masa import MasaConfig, MasaForCausalLM, attention_parameters, removed_share
from cospadi.masa.models.attention import SharedMatrices, share_attention
from cospadi.masa.models.configuration import assignment
from tiny import token_ids

SIZES = {
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "coefficient_embedding_size": 10,
    "coefficient_hidden_size": 9,
}
DESIGNS = {
    "dense": {"attention_sharing": "dense"},
    "gqa": {"attention_sharing": "gqa", "num_key_value_heads": 2},
    "low_rank": {"attention_sharing": "low_rank"},
    "sequential": {"attention_sharing": "sequential"},
    "repeat": {"attention_sharing": "repeat"},
    "masa_qkvo": {},
    "masa_qkv": {"shared_types": ["q", "k", "v"]},
    "masa_gqa_biases": {"num_key_value_heads": 2, "attention_bias": True, "num_atoms": 3},
    "masa_head_dim": {"head_dim": 8},
    "masa_slow_coefficients": {"coefficient_rate": 0.1, "coefficient_start": "spread"},
}


def config(**fields):
    return MasaConfig(**(SIZES | fields))


def model(seed=0, dtype=torch.float32, **fields):
    """With weights so large that a wrong one changes the output visibly."""
    torch.manual_seed(seed)
    built = MasaForCausalLM(config(initializer_range=0.2, **fields)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(std=0.3)
    return built


def attention_numel(built):
    of_attention = [
        parameter.numel()
        for name, parameter in built.named_parameters()
        if ("shared_attention" in name or "self_attn" in name) and not name.endswith("proj.bias")
    ]
    return sum(of_attention)


@pytest.mark.parametrize("fields", DESIGNS.values(), ids=DESIGNS)
class TestEveryDesign:
    def test_parameter_count_is_exact(self, fields):
        built = model(**fields)
        assert attention_numel(built) == attention_parameters(built.config, folded=False)
        built.fold()
        assert attention_numel(built) == attention_parameters(built.config)

    def test_equals_the_dense_model_of_its_own_weights(self, fields):
        built, ids = model(dtype=torch.float64, **fields), token_ids(2, 20)
        dense = built.to_llama()
        assert type(dense) is LlamaForCausalLM and dense.dtype == torch.float64
        with torch.no_grad():
            torch.testing.assert_close(dense(ids).logits, built(ids).logits, rtol=1e-10, atol=1e-10)
            assert built(ids).logits.std() > 0.1

    def test_folding_and_composing_change_no_bit(self, fields):
        built, ids = model(**fields), token_ids(2, 20)
        with torch.no_grad():
            before = built(ids).logits
            built.fold()
            assert torch.equal(built(ids).logits, before)
            built.compose()
            assert torch.equal(built(ids).logits, before)
            built.release()
            assert torch.equal(built(ids).logits, before)

    def test_generation_with_cache_equals_generation_without(self, fields):
        built, ids = model(dtype=torch.float64, **fields), token_ids(2, 7)
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(ids),
        }
        cached = built.generate(ids, use_cache=True, **options)
        assert cached.shape == (2, 13)
        assert torch.equal(cached, built.generate(ids, use_cache=False, **options))
        assert torch.equal(cached, built.to_llama().generate(ids, **options))

    def test_every_parameter_gets_a_gradient(self, fields):
        built, ids = model(dtype=torch.float64, **fields).train(), token_ids(2, 12)
        built(ids, labels=ids).loss.backward()
        for name, parameter in built.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    def test_starts_with_the_weights_of_a_dense_layer(self, fields):
        torch.manual_seed(3)
        wide = fields | ({"head_dim": 48} if "head_dim" in fields else {}) | {"attention_bias": False}
        built = MasaForCausalLM(config(hidden_size=96, num_hidden_layers=6, **wide))
        for layer in built.model.layers:
            for name in "qkvo":
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                assert weight.std().item() == pytest.approx(0.02, rel=0.06), name
                assert abs(weight.mean().item()) < 0.002


def test_the_published_share_is_removed():
    config = MasaConfig(hidden_size=512, num_hidden_layers=9, num_attention_heads=8, num_atoms=3)
    layers, atoms, size = 9, 3, 512 * 512
    assert removed_share(config) == pytest.approx(1 - atoms * (size + layers) / (layers * size), rel=1e-12)
    assert removed_share(config) == pytest.approx(2 / 3, abs=4e-5)
    qkv = MasaConfig(hidden_size=512, num_hidden_layers=9, num_attention_heads=8, shared_types=["q", "k", "v"])
    assert qkv.num_atoms == 3 and removed_share(qkv) == pytest.approx(0.5, abs=4e-5)
    grouped = config.from_dict({**config.to_dict(), "attention_sharing": "gqa", "num_key_value_heads": 2})
    assert removed_share(grouped) == pytest.approx(3 / 8)


def test_weights_are_combinations_of_shared_atoms():
    built = model(dtype=torch.float64)
    for name, matrices in built.model.shared_attention.items():
        assert matrices.atoms.shape == (2, 24, 24)
        table = matrices.network.table()
        for index, layer in enumerate(built.model.layers):
            wanted = torch.einsum("s,soi->oi", table[index], matrices.atoms)
            torch.testing.assert_close(getattr(layer.self_attn, f"{name}_proj").weight, wanted)


def test_sharing_without_coefficients():
    assert assignment(config(attention_sharing="sequential")) == (0, 0, 0, 1, 1, 1)
    assert assignment(config(attention_sharing="repeat")) == (0, 1, 0, 1, 0, 1)
    assert assignment(config(attention_sharing="sequential", num_hidden_layers=7, num_atoms=3)) == (0, 0, 0, 1, 1, 2, 2)
    assert assignment(config()) is None
    built = model(attention_sharing="repeat")
    weights = [layer.self_attn.v_proj.weight for layer in built.model.layers]
    assert weights[0].data_ptr() == weights[2].data_ptr() != weights[1].data_ptr()
    built.compose()  # already as large as it gets
    assert built.model.layers[0].self_attn.v_proj.composed is None


def test_only_the_chosen_types_are_shared():
    built = model(shared_types=("v", "q"))
    assert built.config.shared_types == ["q", "v"] and list(built.model.shared_attention) == ["q", "v"]
    assert type(built.model.layers[1].self_attn.o_proj) is nn.Linear


def test_eager_and_sdpa_agree_and_padding_is_ignored():
    built, ids = model(dtype=torch.float64), token_ids(1, 9)
    with torch.no_grad():
        plain = built(ids).logits
        built.set_attn_implementation("eager")
        output = built(ids, output_attentions=True)
        torch.testing.assert_close(output.logits, plain, rtol=0, atol=1e-4)  # eager rounds its softmax to float32
        assert len(output.attentions) == 6 and output.attentions[0].shape == (1, 4, 9, 9)
        built.set_attn_implementation("sdpa")
        padded = torch.cat([torch.full((1, 3), 256), ids], 1)
        mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        shifted = built(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(shifted, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    ids, gradients = token_ids(2, 12), []
    for checkpointing in (False, True):
        built = model(dtype=torch.float64).train()
        if checkpointing:
            built.gradient_checkpointing_enable({"use_reentrant": reentrant})
            built.enable_input_require_grads()
        built(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in built.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_composition_stays_in_full_precision_under_autocast():
    built = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = built.model.layers[0].self_attn.q_proj.weight
        assert built(token_ids(1, 5)).logits.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert torch.equal(weight, built.model.layers[0].self_attn.q_proj.weight)


def test_training_and_loading_release_composed_weights():
    built, ids = model(), token_ids(1, 8)
    built.compose()
    built.train()
    assert built.model.layers[0].self_attn.q_proj.composed is None
    built.eval().compose()
    other = model(seed=5)
    built.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(built(ids).logits, other(ids).logits)


def test_a_copy_is_independent():
    built, ids = model(), token_ids(1, 8)
    twin = copy.deepcopy(built)
    with torch.no_grad():
        before = built(ids).logits
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(built(ids).logits, before) and not torch.equal(twin(ids).logits, before)
        twin.load_state_dict(built.state_dict())
        assert torch.equal(twin(ids).logits, before)


def test_folded_configuration_can_be_trained_too():
    for start in ("network", "spread"):
        matrices = model(folded=True, coefficient_start=start).model.shared_attention["q"]
        assert isinstance(matrices, SharedMatrices)
        torch.testing.assert_close(matrices.coefficients.norm(dim=1), torch.ones(6))
    gram = matrices.coefficients.T @ matrices.coefficients
    torch.testing.assert_close(gram, 3 * torch.eye(2), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_atoms": 7}, "num_atoms 7 is not possible for 6 layers"),
        ({"num_atoms": 0}, "num_atoms 0"),
        ({"attention_sharing": "sequential", "num_atoms": 9}, "num_atoms 9"),
        ({"attention_sharing": "mass"}, "did you mean 'masa'"),
        ({"attention_sharing": "other"}, "choose one of dense, gqa"),
        ({"shared_types": []}, "shared_types"),
        ({"shared_types": ["q", "q"]}, "each once"),
        ({"shared_types": ["gate"]}, "must be some of q, k, v, o"),
        ({"attention_sharing": "low_rank", "attention_rank": 25}, "not between 1 and 24"),
        ({"attention_sharing": "gqa"}, "num_key_value_heads smaller"),
        ({"attention_sharing": "dense", "num_key_value_heads": 2}, "are 'gqa'"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"coefficient_hidden_size": 0}, "at least 1"),
        ({"coefficient_rate": 0.0}, "coefficient_rate 0.0 must be a number above 0"),
        ({"coefficient_rate": float("inf")}, "above 0"),
        ({"coefficient_rate": "0.1"}, "above 0"),
        ({"coefficient_start": "far"}, "coefficient_start 'far' must be one of network, spread"),
        ({"num_atoms": 2.5}, r"num_atoms 2\.5 must be a whole number"),
        ({"attention_rank": "8"}, "attention_rank '8' must be a whole number"),
        ({"coefficient_embedding_size": None}, "coefficient_embedding_size None must be a whole number"),
        ({"shared_types": None}, "must be some of q, k, v, o"),
    ],
)
def test_wrong_configurations(fields, message):
    with pytest.raises(RecipeError, match=message):
        config(**fields)


def test_layers_of_unequal_shapes():
    built = model(attention_sharing="dense")
    attentions = [layer.self_attn for layer in built.model.layers]
    attentions[4].k_proj = nn.Linear(24, 12)
    with pytest.raises(ModelError, match=r"the k projections.*layer 4 has \(12, 24\), layer 0 has \(24, 24\)"):
        share_attention(attentions, config())
    attentions[2].q_proj = nn.Identity()
    with pytest.raises(ModelError, match="q_proj"):
        share_attention(attentions, config())
