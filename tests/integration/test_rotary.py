"""Every kind of rotary positions, from compression to the dense export; some write their frequencies in the forward."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from cospadi import compress, prune
from cospadi.checkpoint import export_dense
from tiny import save_tiny, tiny_text, token_ids

TRAINED = {"original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}
ROPES = [
    ("phi3", LONG, TRAINED),
    ("llama", LONG | TRAINED | {"factor": 4.0}, {}),
    ("llama", {"rope_type": "dynamic", "factor": 2.0}, {}),
    ("llama", {"rope_type": "yarn", "factor": 4.0} | TRAINED, {}),
    ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | TRAINED, {}),
    ("llama", {"rope_type": "linear", "factor": 2.0}, {}),
    ("llama", {"rope_type": "proportional", "partial_rotary_factor": 0.5}, {}),
]


@pytest.mark.parametrize(("architecture", "rope", "others"), ROPES, ids=[f"{a}-{r['rope_type']}" for a, r, _ in ROPES])
def test_compressed_pruned_and_exported(tmp_path, architecture, rope, others):
    save_tiny(tmp_path / "m", architecture, rope_parameters=rope | {"rope_theta": 10000.0}, **others)
    run = {"calibration": [tiny_text(6000)]}
    text = {"calibration": {"samples": 8, "seq_len": 48}}
    compress(tmp_path / "m", tmp_path / "small", keep=0.6, method="svd", recipe=text, **run)
    prune(tmp_path / "m", tmp_path / "short", method="uidl", blocks=1, recipe=text, **run)
    export_dense(tmp_path / "small", tmp_path / "dense", dtype="float32")
    small, dense, short = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("small", "dense", "short")
    )
    assert short.config.num_hidden_layers == 2
    for length in (20, 100, 20):  # below and beyond the length that longrope was trained for, and back
        ids = token_ids(2, length)
        with torch.no_grad():
            assert torch.allclose(small(ids).logits, dense(ids).logits, atol=2e-5)
            assert short(ids).logits.isfinite().all()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 256}
    ids = token_ids(1, 20)  # generation crosses that length
    assert torch.equal(small.generate(ids, **options), dense.generate(ids, **options))
