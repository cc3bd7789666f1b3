"""State-space models, whose initialisers and fused kernels use the weight of a layer without calling it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cospadi import compress
from cospadi.checkpoint import export_dense
from cospadi.layers import ComputedLinear
from tiny import byte_tokenizer, tiny_text

ids = torch.arange(20).reshape(2, 10)
COMMON = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
CONFIGS = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "bamba": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_compressed_loads_and_equals_its_export(architecture, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **COMMON, **CONFIGS[architecture]))
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    recipe = {"calibration": {"samples": 4, "seq_len": 32}}
    compress(tmp_path / "m", tmp_path / "small", keep=0.5, method="rtn", calibration=[tiny_text()], recipe=recipe)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert any(isinstance(module, ComputedLinear) for module in small.modules())
    export_dense(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(small.generate(ids[:1], max_new_tokens=4), dense.generate(ids[:1], max_new_tokens=4))
