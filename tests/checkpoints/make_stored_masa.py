"""Write the stored checkpoint of layers with shared atoms, which every later version must load.

    python tests/checkpoints/make_stored_masa.py     # from the repository root; refuses to overwrite

Run once for each version of the format, then commit what it wrote under ``tests/checkpoints/masa_v<version>/`` and
never change it. ``expected.json`` holds each dense weight's product with a fixed input, and the model's logits.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoints.make_stored import build  # noqa: E402
from cospadi.checkpoint import save  # noqa: E402
from cospadi.checkpoint.formats.shared import SHARED  # noqa: E402
from cospadi.layers.shared_linear import SharedSpec  # noqa: E402

KINDS = {
    "q": (6 * 2, 12, 2, (3, 0, 1)),
    "k": (6, 12, 1, (0, 0, 0)),
    "v": (6, 12, 3, (0, 0, 0)),
    "o": (12, 12, 0, (1, 2, 4)),
}
"""By projection: outputs, inputs, atoms, ranks of the three layers."""


def meaning(model: PreTrainedModel) -> dict:
    """What a loaded model amounts to, in numbers that a JSON file can hold."""
    probe = torch.linspace(-1, 1, 12, dtype=torch.float64)
    layers = {name: (layer.dense_weight(torch.float64) @ probe).tolist() for name, layer in SHARED.layers(model)}
    with torch.no_grad():
        return {"layers": layers, "logits": model(torch.arange(12)[None]).logits.float().tolist()}


def main() -> None:
    out = HERE / f"masa_v{SHARED.version}"
    if out.exists():
        raise SystemExit(f"{out} is there already; stored checkpoints are never changed")
    model = build("qwen2", 3, torch.bfloat16, False)
    specs = [
        SharedSpec(tuple(f"model.layers.{i}.self_attn.{kind}_proj" for i in range(3)), d_in, d_out, atoms, ranks)
        for kind, (d_out, d_in, atoms, ranks) in KINDS.items()
    ]
    SHARED.replace(model, specs)
    with torch.no_grad():
        for _, layer in SHARED.layers(model):
            for parameter in layer.factors().values():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    save(model, None, out, specs)
    expected = meaning(model) | {"groups": [spec.to_dict() for spec in specs]}
    (out / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
