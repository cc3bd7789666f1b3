"""Seconds of `auto` on a few decoder layers of an 8B Llama's shapes: random weights with a decaying spectrum.

Errors of most representations are learnt on the first two groups of each kind, so further layers cost much less. Usage:
python benchmarks/auto_8b.py OUT.json --calibration TEXT --tokenizer MODEL [--layers 4] [--keep 0.4] [--bits any]
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cospadi import Recipe, compress


def write_model(out: Path, layers: int, tokenizer_of: str, device: torch.device) -> None:
    """A Llama with the widths of an 8B one, inputs of very different weight, and another model's small vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=len(tokenizer), max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).bfloat16()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            size = parameter.shape[1]
            scale = torch.arange(1, size + 1, device=device, dtype=torch.float32) ** -0.4
            scale = scale[torch.randperm(size, device=device, generator=generator)] / scale.norm()
            weight = scale * torch.randn(parameter.shape, device=device, generator=generator)
            parameter.data = (weight * (64 if "embed" in name else 1)).bfloat16()
    model.cpu().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokenizer", required=True, help="a model directory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--bits", default="any", choices=("any", "16"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    recipe = Recipe(
        method="auto",
        keep=options.keep,
        options={"bits": 16 if options.bits == "16" else "any"},
        calibration={"samples": 128, "seq_len": 1024},
        device=options.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", options.layers, options.tokenizer, device)
        report = compress(
            Path(folder) / "model", Path(folder) / "out", recipe=recipe, calibration=options.calibration
        ).report
    data = {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()
        },
        "command": f"python benchmarks/auto_8b.py OUT --calibration TEXT --tokenizer MODEL --layers {options.layers} "
        f"--keep {options.keep} --bits {options.bits} --device {device.type}",
        "seed": 0,
        "layers": options.layers,
        **{key: report[key] for key in ("seconds", "peak_memory_bytes", "peak_device_bytes", "keep_actual")},
    }  # fmt: skip
    options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data["seconds"]))


if __name__ == "__main__":
    main()
