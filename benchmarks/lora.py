"""A LoRA adapter on a compressed model: perplexity before and after, and the same adapter on the dense export.

    python benchmarks/lora.py MODEL --train FILE --text FILE --out JSON --work DIRECTORY [--keep 0.2] [--method auto]

Compresses MODEL into DIRECTORY/small, exports it to DIRECTORY/dense, trains the adapter on the first nine tenths of the
documents of --train and measures perplexity on the rest of them and on --text. What lies in DIRECTORY already, and
every figure in the JSON file, is not made again, so that an interrupted run goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cospadi import compress, load
from cospadi.calibration import read_texts, token_blocks
from cospadi.checkpoint import export_dense
from cospadi.evaluation.perplexity import perplexity
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions

HELD_OUT = 10  # the last tenth of the documents


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="documents to train on; a part is held out")
    parser.add_argument("--text", required=True, help="a text of another kind, such as WikiText-2")
    parser.add_argument("--calibration", help="for the compression; default: the documents to train on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and adapter")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--samples", type=int, default=256, help="calibration blocks")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--max-blocks", type=int, help="measure on the first blocks of each text only")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Figures:
    """The JSON file: every figure is computed once."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.found |= head

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A figure by its name, computed and written now unless the file has it."""
        if name not in self.found:
            self.found[name] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps(self.found[name]), flush=True)
        return self.found[name]


def commit() -> str:
    place = Path(__file__).parent
    said = subprocess.run(["git", "-C", place, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return said.stdout.strip()


def opened(source: Path | str, device: torch.device) -> tuple[Any, Any]:
    """A model in float32, so that compressed and dense logits can be compared, and its tokenizer."""
    return load(source, dtype=torch.float32, device=str(device))


def train(model: Any, ids: torch.Tensor, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train an adapter on every linear layer; loss of each step."""
    torch.manual_seed(options.seed)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(options.seed))
    adapted.train()
    start, losses = time.monotonic(), []
    for step in range(options.steps):
        rows = [int(order[(step * options.batch + i) % len(order)]) for i in range(options.batch)]
        part = ids[rows].to(device)
        loss = adapted(part, labels=part).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(loss.item(), 4))
    adapted.eval().save_pretrained(options.work / "adapter")
    return {
        "adapted_layers": sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in adapted.modules()),
        "trained_parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.monotonic() - start, 1),
        "losses": losses,
    }


def main() -> None:
    options = arguments()
    device = resolve_device(options.device)
    small, dense, adapter = (options.work / name for name in ("small", "dense", "adapter"))
    figures = Figures(
        options.out,
        {
            "command": " ".join(["python", *sys.argv]),
            "hardware": device_name(device),
            "versions": versions() | {"peft": peft.__version__},
            "commit": commit(),
            "settings": {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(options).items()},
        },
    )
    documents = read_texts(options.train).documents
    cut = len(documents) - max(1, len(documents) // HELD_OUT)
    texts = {"held_out": list(documents[cut:]), Path(options.text).stem: options.text}

    def measured(model: Any, tokenizer: Any) -> dict[str, float]:
        return {
            name: perplexity(
                model, tokenizer, text, seq_len=options.seq_len, max_blocks=options.max_blocks, device=device
            ).perplexity
            for name, text in texts.items()
        }

    def compressed() -> dict[str, Any]:
        start = time.monotonic()
        result = compress(
            options.model,
            small,
            keep=options.keep,
            method=options.method,
            calibration=options.calibration or list(documents[:cut]),
            recipe={"calibration": {"samples": options.samples}, "device": options.device, "seed": options.seed},
        )
        return {"keep_actual": result.keep_actual, "seconds": round(time.monotonic() - start, 1)}

    figures.once("compression", compressed)
    if not (dense / "config.json").exists():
        export_dense(small, dense, dtype="float32")
    figures.once("perplexity_original", lambda: measured(*opened(options.model, device)))
    figures.once("perplexity_compressed", lambda: measured(*opened(small, device)))
    if not (adapter / "adapter_config.json").exists():
        figures.found.pop("training", None)
    model, tokenizer = opened(small, device)
    blocks = token_blocks(
        list(documents[:cut]),
        tokenizer,
        samples=options.steps * options.batch,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    figures.once("training", lambda: train(model, blocks.ids.long(), options, device))
    outputs = {}
    sample = blocks.ids[:1].long().to(device)
    for name, source in (("compressed", small), ("export", dense)):
        adapted = PeftModel.from_pretrained(opened(source, device)[0], adapter).eval()
        with torch.no_grad():
            outputs[name] = adapted(sample).logits.float().cpu()
        figures.once(f"perplexity_adapted_{name}", lambda adapted=adapted: measured(adapted, tokenizer))
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        outputs["merged_export"] = merged(sample).logits.float().cpu()
    figures.found.pop("logits", None)
    figures.once(
        "logits",
        lambda: {
            "largest": float(outputs["compressed"].abs().max()),
            "export_differs_by": float((outputs["export"] - outputs["compressed"]).abs().max()),
            "merged_export_differs_by": float((outputs["merged_export"] - outputs["compressed"]).abs().max()),
        },
    )


if __name__ == "__main__":
    main()
