"""Write the stored checkpoints of one format version, which every later version must load.

    python tests/checkpoints/make_stored.py     # from the repository root; refuses to overwrite

Run once for each format version, then commit what it wrote under ``tests/checkpoints/v<version>/`` and never change
it. ``expected.json`` beside the weights says what they mean, computed by the version that wrote them: a digest of every
unpacked factor (exact), the dense weights' products with a fixed input, and the model's logits.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoints.factory import KINDS, compress_randomly  # noqa: E402
from cospadi.checkpoint import save  # noqa: E402
from cospadi.checkpoint.formats.factored import FACTORED  # noqa: E402
from cospadi.format import FORMAT_VERSION, unpack  # noqa: E402

TINY = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 16,
}
# name: (architecture, layers, dtype, tied, shard size, kinds)
STORED = {
    "every_kind": ("qwen2", 3, torch.bfloat16, False, "6KB", list(KINDS)),
    "tied_float16": ("llama", 1, torch.float16, True, "5GB", list(KINDS)[-4:]),
}


def build(architecture: str, layers: int, dtype: torch.dtype, tied: bool) -> PreTrainedModel:
    """A random model, seeded."""
    torch.manual_seed(FORMAT_VERSION)
    config = AutoConfig.for_model(architecture, num_hidden_layers=layers, tie_word_embeddings=tied, **TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    return model


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's float32 bytes, first the rows."""
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


def meaning(model: PreTrainedModel) -> dict:
    """What a loaded model amounts to, in numbers that a JSON file can hold."""
    layers = {}
    for _, layer in FACTORED.layers(model):
        found = {"codes": digest(unpack(layer.packed_codes(), layer.codes_spec))}
        packed = layer.packed_dictionary()
        if packed is not None:
            found["dictionary"] = digest(unpack(packed, layer.dictionary_spec))
        probe = torch.linspace(-1, 1, layer.in_features, dtype=torch.float64)
        found["product"] = (layer.dense_weight(torch.float64) @ probe).tolist()
        layers[layer.name] = found
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits.float()
    return {"layers": layers, "logits": logits.tolist()}


def main() -> None:
    for name, (architecture, layers, dtype, tied, shards, kinds) in STORED.items():
        out = HERE / f"v{FORMAT_VERSION}" / name
        if out.exists():
            raise SystemExit(f"{out} is there already; stored checkpoints are never changed")
        model = build(architecture, layers, dtype, tied)
        groups = compress_randomly(model, kinds, seed=FORMAT_VERSION, atoms=37)
        save(model, None, out, groups, max_shard_size=shards)
        expected = meaning(model) | {"groups": [group.to_dict() for group in groups]}
        (out / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
