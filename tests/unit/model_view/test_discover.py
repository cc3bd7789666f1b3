import copy
import resource

import pytest
import torch
from torch import nn

from cospadi.errors import ModelError, NumericalError
from cospadi.model_view import LinearGroup, check_weights, discover, skeleton
from tiny import ARCHITECTURES, MORE_ARCHITECTURES, tiny_config, tiny_model, token_ids

GATED = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
EXPECTED = dict.fromkeys((*ARCHITECTURES, "gemma3_text"), GATED) | {
    "phi3": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "opt": [("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)],
    "bloom": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES, "bloom"])
def test_groups_are_linears_with_the_same_input(architecture):
    model = tiny_model(architecture)
    view = discover(model)
    assert len(view.layers) == 3
    for layer in range(3):
        groups = view.of_layer(layer)
        assert [tuple(n.rsplit(".", 1)[1] for n in g.modules) for g in groups] == EXPECTED[architecture]
    for group in view.groups:
        for name, d_out in zip(group.modules, group.d_out, strict=True):
            assert name.startswith(f"{view.layers_name}.{group.layer}.")
            assert view.weight(name).shape == (group.d_in, d_out)
            assert torch.equal(view.weight(name), model.get_submodule(name).weight.T)
    inside = {n for n, m in model.get_submodule(view.layers_name).named_modules() if isinstance(m, nn.Linear)}
    assert set(view.module_names) == {f"{view.layers_name}.{name}" for name in inside}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3_text"])
def test_a_skeleton_gives_the_same_groups(architecture):
    config = tiny_config(architecture)
    view = discover(skeleton(config))
    assert all(p.device.type == "meta" for p in view.model.parameters())
    assert view.groups == discover(tiny_model(architecture)).groups


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_model("qwen3").train()
    ids = token_ids(2, 9)
    before = model(input_ids=ids).logits
    weights = {n: p.clone() for n, p in model.named_parameters()}
    discover(model)
    assert model.training
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model(input_ids=ids).logits, before)


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}
ROPES = {
    "longrope": LONG | {"original_max_position_embeddings": 32, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rotary_positions_is_probed_without_a_trace(rope):
    model = tiny_model("llama", rope_parameters=ROPES[rope] | {"rope_theta": 10000.0})
    ids = token_ids(1, 40)
    with torch.no_grad():
        before = copy.deepcopy(model)(input_ids=ids).logits
    state = {name: set(vars(module)) | set(module._buffers) for name, module in model.named_modules()}
    view = discover(model)
    assert len(view.groups) == 12 and view.groups == discover(skeleton(model.config)).groups
    assert {name: set(vars(module)) | set(module._buffers) for name, module in model.named_modules()} == state
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_forward_may_write_into_buffers_and_attributes_of_any_size():
    class Counting(nn.Module):
        def __init__(self, inner, device):
            super().__init__()
            self.inner = inner
            self.register_buffer("seen", torch.zeros(4, dtype=torch.bfloat16, device=device))
            self.register_buffer("mask", torch.empty(2**31, dtype=torch.bool, device="meta"), persistent=False)
            self.limits = torch.ones(4, device=device)

        def forward(self, x):
            self.seen.add_(1)
            self.limits = self.limits.to(x.device)
            self.register_buffer("length", torch.tensor(x.shape[1]))
            return self.inner(x) + self.limits[0] + self.mask[-1]

    for model in (tiny_model(), skeleton(tiny_config())):
        for layer in model.model.layers:
            layer.mlp = Counting(layer.mlp, model.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        view = discover(model)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**19  # KiB: less than any of the masks
        assert len(view.groups) == 12
        counting = model.model.layers[0].mlp
        assert "length" not in counting._buffers and counting.limits.device == model.device
        assert model.device.type == "meta" or not counting.seen.any()


def test_tied_head_is_left_alone():
    view = discover(tiny_model("llama", tie_word_embeddings=True))
    assert "lm_head" not in view.module_names and len(view.groups) == 12


def test_parallel_blocks_share_one_input():
    view = discover(tiny_model("cohere", **{"num_key_value_heads": 2, "intermediate_size": 44}))
    assert [len(g.modules) for g in view.of_layer(0)] == [5, 1, 1]


def test_group_name_and_bytes():
    group = LinearGroup(("m.0.q", "m.0.k"), 0, 10, (7, 3))
    assert group.name == "m.0.q+k" and group.dense_bytes == 200


@pytest.mark.parametrize(
    ("architecture", "overrides", "what"),
    [
        ("gpt2", {}, "Conv1D"),
        ("mixtral", {"intermediate_size": 20, "num_key_value_heads": 2}, "MixtralExperts"),
        (
            "qwen3_moe",
            {"moe_intermediate_size": 12, "num_experts": 4, "num_key_value_heads": 2, "head_dim": 6},
            "Qwen3MoeExperts",
        ),
    ],
)
def test_unsupported_architectures_are_named(architecture, overrides, what):
    model = skeleton(tiny_config(architecture, **overrides))
    with pytest.raises(ModelError, match=what) as caught:
        discover(model)
    assert "\n" not in str(caught.value)


def test_a_linear_that_is_never_called_is_refused():
    model = tiny_model()
    model.model.layers[1].mlp.spare = nn.Linear(24, 5)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.spare is never called"):
        discover(model)


def test_a_linear_that_is_called_twice_is_refused():
    model = tiny_model()
    layer = model.model.layers[2]
    layer.mlp.up_proj = layer.mlp.gate_proj
    with pytest.raises(ModelError, match=r"gate_proj is called 2 times"):
        discover(model)


MAMBA = {"state_size": 4, "time_step_rank": 3}
RECURRENT = {"num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 48, "attention_window_size": 8}
JAMBA = {"intermediate_size": 44, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
JAMBA |= {"mamba_d_state": 4, "mamba_dt_rank": 3}


@pytest.mark.parametrize(
    ("architecture", "overrides", "matter"),
    [
        ("recurrent_gemma", RECURRENT, r"rg_lru .* 'input_gate_weight' of shape \(4, 6, 6\), .* not an nn\.Linear"),
        ("mamba", MAMBA, r"uses the weight of backbone\.layers\.0\.mixer\.dt_proj without calling the layer"),
        (
            "jamba",
            JAMBA | {"num_experts": 1, "num_experts_per_tok": 1},
            r"uses the weight of .*dt_proj without calling",
        ),
    ],
)
def test_layers_that_are_no_experts_are_not_called_experts(architecture, overrides, matter):
    with pytest.raises(ModelError, match=matter) as caught:
        discover(skeleton(tiny_config(architecture, **overrides)))
    assert "expert" not in str(caught.value)


def test_experts_in_a_list_are_called_experts():
    class Routed(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

        def forward(self, x):
            return self.experts[0](x)

    model = tiny_model()
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.1\.gate_proj is an expert"):
        discover(model)


def test_a_weight_shared_by_two_linears_is_refused():
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj shares its weight with model\.layers\.0"):
        discover(model)


def test_quantised_weights_are_refused():
    model = tiny_model()
    linear = model.model.layers[0].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"o_proj holds torch.int8"):
        discover(model)


def test_layers_that_do_not_feed_one_into_the_next_are_refused():
    model = tiny_model()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ModelError, match="do not feed into each other"):
        discover(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_bad_weights_are_named(bad, what):
    model = tiny_model("qwen2")
    view = discover(model)
    check_weights(view)
    with torch.no_grad():
        getattr(model.model.layers[2].self_attn.k_proj, what).view(-1)[3] = bad
    with pytest.raises(NumericalError, match=rf"layers\.2\.self_attn\.k_proj: 1 of \d+ entries of the {what}"):
        check_weights(view)
