"""What loss-weighted Grams are worth to dictionaries, low rank and integers: the same runs on plain and weighted Grams.

    python benchmarks/loss_gram.py MODEL --calibration FILE --text NAME=FILE --text NAME=FILE --out JSON

Every row is a run of the engine with equal shares for all groups; model, calibration text, statistics and token weights
are shared. Perplexity, and KL to the dense model, are measured on every text in the model's own dtype (on a processor:
float32) with every compressed weight multiplied out. Rows are written as they finish; those in the output file stay.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from measuring import Stream, measured, stream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import read_texts, token_blocks
from cospadi.engine.compress import CompressRun
from cospadi.engine.journal import Journal
from cospadi.engine.outputs import Checkpoint
from cospadi.engine.plan.plan import Plan
from cospadi.evaluation.comparison_row import LentInputs, Shared, dense_weights
from cospadi.model_view import discover, open_model
from cospadi.progress import silent
from cospadi.recipe import Recipe
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions, weights_sha256

CELLS = {
    **{f"pursuit {keep}": {"method": "pursuit", "keep": keep} for keep in (0.8, 0.6, 0.4)},
    **{f"compot {keep}": {"method": "compot", "keep": keep} for keep in (0.8, 0.6)},
    **{f"svd_llm {keep}": {"method": "svd_llm", "keep": keep} for keep in (0.9, 0.8, 0.6)},
    "cospadi 0.8": {"method": "cospadi", "keep": 0.8},
    **{
        f"gptq {bits} bits": {"method": "gptq", "keep": 0.9, "options": {"bits": bits, "group": 64}}
        for bits in (4, 3, 2)
    },
}
"""Settings by name. `gptq` takes the Grams of the compressed layers, as it does by itself, others the original's."""


class Measured(Checkpoint):
    """Measures what a run made and writes nothing.

    Args:
        out: the run's directory.
        dense: the dense model, on the device.
        texts: blocks of tokens by name.
    """

    def __init__(self, out: Path, dense: PreTrainedModel, texts: dict[str, Stream]) -> None:
        super().__init__(out, silent)
        self.dense, self.texts = dense, texts
        self.found: dict[str, Any] = {}

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, journal: Journal) -> None:
        """Measure the weights that the journal's groups stand for."""
        made = deepcopy(self.dense)
        parameters = dict(made.named_parameters())
        with torch.no_grad():
            for name, weight in dense_weights(plan, journal, made.device, dtype=made.dtype).items():
                parameters[name].copy_(weight)
        weights = plan.bytes_before // 2
        self.found["bits_per_weight"] = round(8 * plan.bytes_after / weights, 4)
        self.found |= {name: measured(made, self.dense, ids, made.device) for name, ids in self.texts.items()}

    def facts(self) -> dict[str, Any]:
        """Nothing: there are no files."""
        return {}


def variants(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Kinds of Grams by name."""
    found: list[tuple[str, dict[str, Any]]] = [("plain", {"gram": "plain"})]
    for blend in options.blend.split(","):
        found.append((f"loss, blend {float(blend):g}", {"gram": "loss", "gram_blend": float(blend)}))
    if options.sequential:
        found = [(f"{name}, sequential", change | {"sequential": True}) for name, change in found]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE, to measure on; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--cells", help=f"some of: {'; '.join(CELLS)}; separated by semicolons")
    parser.add_argument("--blend", default="0.2", help="shares of the plain Gram, separated by commas")
    parser.add_argument("--sequential", action="store_true", help="all methods on the compressed layers' outputs")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--max-blocks", type=int, help="only the first blocks of every text")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after so long")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    begun = time.perf_counter()
    options = arguments()
    device = resolve_device(options.device)
    model, tokenizer = open_model(options.model)
    dense = deepcopy(model).to(device) if device.type == "cuda" else deepcopy(model).float()
    texts = {}
    for item in options.text:
        name, file = item.split("=", 1)
        texts[name] = stream(read_texts(file), tokenizer, options.max_blocks, options.seq_len)
    calibration = {"source": options.calibration, "samples": options.samples, "seq_len": options.seq_len}
    base = Recipe(calibration=calibration, device=options.device, seed=options.seed, allocation="uniform")
    blocks = token_blocks(
        options.calibration, tokenizer, samples=options.samples, seq_len=options.seq_len, seed=options.seed
    )
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": device_name(device),
        "versions": versions(),
        "seed": options.seed,
        "calibration": blocks.report,
        "blocks": {name: len(ids) for name, ids in texts.items()},
        "dense": {name: measured(dense, dense, ids, device) for name, ids in texts.items()},
        "rows": [],
    }
    if options.out.exists():
        result["rows"] = json.loads(options.out.read_text())["rows"]
    have = {(row["cell"], row["gram"]) for row in result["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        shared = Shared(
            source=options.model,
            model=model,
            tokenizer=tokenizer,
            view=discover(model),
            blocks=blocks,
            device=device,
            statistics=Path(folder) / "statistics",
            fingerprint={"tokens": blocks.sha256, "model": weights_sha256(model)},
            seconds={},
        )
        for cell in options.cells.split(";") if options.cells else CELLS:
            for gram, change in variants(options):
                if (cell, gram) in have or time.perf_counter() - begun > options.seconds:
                    continue
                recipe = base.merged(CELLS[cell] | change)
                outputs = Measured(Path(folder) / f"run-{len(result['rows'])}", dense, texts)
                inputs = LentInputs(shared, recipe, silent)
                report = CompressRun(inputs, outputs, recipe, silent, "").go(fresh=False).report
                row = {"cell": cell, "gram": gram, "seconds": report["seconds"], "warnings": report["warnings"]}
                result["rows"].append(row | outputs.found)
                shown = " ".join(
                    f"{text} {outputs.found[text]['perplexity']:.3f} {outputs.found[text]['kl']:.4f}" for text in texts
                )
                print(f"{cell} | {gram} | {outputs.found['bits_per_weight']:.3f} | {shown}", flush=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
