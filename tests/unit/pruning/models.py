"""Tiny models of every kind of block, and what tests of pruning compare."""

import torch

from tiny import _GATED, tiny_model

STANDARD = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_neox", "opt")
FOLDABLE = tuple(name for name in STANDARD if not name.startswith("gemma"))

_KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_OWN = {
    "gpt2": {"n_embd": 24, "n_layer": 5, "n_head": 4, "n_positions": 128},
    "gemma2": _GATED | {"sliding_window": 8, "layer_types": _KINDS},
    "gemma3_text": {"layer_types": _KINDS},
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
