"""Tiny models of every kind of block, and what tests of pruning compare."""

import torch

from tiny import _GATED, tiny_model

STANDARD = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_neox", "opt")
FOLDABLE = tuple(name for name in STANDARD if not name.startswith("gemma"))

EXPERTS = ("mixtral", "qwen3_moe")
"""Stacks of experts, which can be removed block by block, though not factorised."""

HYBRID = ("qwen3_5_text", "lfm2")
"""Blocks of two kinds: linear attention or a short convolution (0, 1, 3) and full attention (2, 4)."""

_KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_OWN = {
    "gpt2": {"n_embd": 24, "n_layer": 5, "n_head": 4, "n_positions": 128},
    "gemma2": _GATED | {"sliding_window": 8, "layer_types": _KINDS},
    "gemma3_text": {"layer_types": _KINDS},
    "qwen3_5_text": _GATED
    | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 6,
        "layer_types": [kind.replace("sliding", "linear") for kind in _KINDS],
    },
    "lfm2": {
        "intermediate_size": 44,
        "num_key_value_heads": 2,
        "block_auto_adjust_ff_dim": False,
        "layer_types": [kind.replace("sliding_attention", "conv") for kind in _KINDS],
    },
    "gemma4_text": _GATED
    | {
        "sliding_window": 8,
        "layer_types": _KINDS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 6,
    },
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _GATED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "granite": _GATED | {"residual_multiplier": 0.22},
}


def deep_model(architecture="llama", blocks=5, **overrides):
    """Five blocks, so that there is something to remove; biases and norms are random."""
    own = _OWN.get(architecture, {}) if blocks == 5 else {}
    return tiny_model(architecture, **({"num_hidden_layers": blocks} | own | overrides))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def skipping(model, layers, removed, ids):
    """Logits of a whole model some of whose blocks pass their input on."""
    for index in removed:
        layers[index].forward = lambda hidden_states, *_, **__: hidden_states
    try:
        return logits(model, ids)
    finally:
        for index in removed:
            del layers[index].forward


@torch.no_grad()
def generated(model, ids, cached):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=cached, pad_token_id=256
    )
