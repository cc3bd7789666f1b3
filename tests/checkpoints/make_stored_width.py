"""Write the stored width-pruned checkpoints of one format version, which every later version must load.

    python tests/checkpoints/make_stored_width.py     # from the repository root; refuses to overwrite

Run once for each version of the format, then commit what it wrote under ``tests/checkpoints/width_v<version>/`` and
never change it. ``expected.json`` beside the weights holds the description and the model's logits, computed by the
version that wrote them.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoints.make_stored import TINY  # noqa: E402
from cospadi.checkpoint.formats.width import (  # noqa: E402
    WIDTH,
    BlockShape,
    LinearShape,
    WidthSpec,
    attach_width,
    describe_width,
)
from cospadi.layers.sliced import BlockParts  # noqa: E402

PARTS = BlockParts("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
LAYER = "model.layers.{}."


def _sliced(index: int, into: int, out: int) -> dict[str, LinearShape]:
    shapes = {
        "self_attn.q_proj": (into, 12, True),
        "self_attn.k_proj": (into, 6, True),
        "self_attn.v_proj": (into, 6, True),
        "self_attn.o_proj": (12, 8, False),
        "mlp.gate_proj": (8, 20, False),
        "mlp.up_proj": (8, 20, False),
        "mlp.down_proj": (20, out, False),
    }
    return {LAYER.format(index) + name: LinearShape(*shape) for name, shape in shapes.items()}


SPECS = {
    "sliced": WidthSpec(
        _sliced(0, 10, 9) | _sliced(1, 9, 12),
        {"model.embed_tokens": 10},
        {
            "model.layers.0": BlockShape(PARTS, (10, 8, 9), 12, (1e-6, 1e-5)),
            "model.layers.1": BlockShape(PARTS, (9, 8, 12), 12, (1e-6, 1e-6)),
        },
    ),
    "channels": WidthSpec(
        {
            LAYER.format(1) + "mlp.gate_proj": LinearShape(12, 7, False),
            LAYER.format(1) + "mlp.up_proj": LinearShape(12, 7, False),
            LAYER.format(1) + "mlp.down_proj": LinearShape(7, 12, False),
        }
    ),
}


def main() -> None:
    for name, spec in SPECS.items():
        out = HERE / f"width_v{WIDTH.version}" / name
        if out.exists():
            raise SystemExit(f"{out} is there already; stored checkpoints are never changed")
        torch.manual_seed(WIDTH.version)
        config = AutoConfig.for_model("qwen2", num_hidden_layers=2, tie_word_embeddings=False, **TINY)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        WIDTH.replace(model, [spec])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
        attach_width(model).save_pretrained(out)
        with torch.no_grad():
            logits = model(torch.arange(12)[None]).logits.float()
        expected = {"spec": WIDTH.describe([describe_width(model)]), "logits": logits.tolist()}
        (out / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
