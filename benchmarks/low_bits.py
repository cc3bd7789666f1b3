"""Few bits a weight on a real model: methods, their parts, and what they cost, beside the dense model.

    python benchmarks/low_bits.py MODEL --calibration FILE --test FILE --second FILE --out JSON [--rows NAME;NAME]

Every row is a run of the product with a recipe, as `cospadi compress` carries it out; its checkpoint is loaded, written
out as dense weights and measured in the model's dtype. The last 64 documents of the calibration file and of the second
file are validation text, which alone chooses defaults; they are never calibrated on. `test` and the rest of the second
file are reported. Rows already in the output file are kept, so an interrupted run goes on.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import measured, stream

from cospadi import compress
from cospadi.calibration import Texts, read_texts
from cospadi.evaluation import load
from cospadi.model_view import open_model
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions

HELD_OUT = 64


def trellis(bits: int, **recipe: Any) -> dict[str, Any]:
    """Trellis codes of some bits, everything else as it is by default."""
    options = {"bits": bits} | recipe.pop("options", {})
    return {"method": "trellis", "keep": 0.9, "options": options} | recipe


def rotated(bits: int, **recipe: Any) -> dict[str, Any]:
    """Rotated integers with one scale a row."""
    return {"method": "rotated", "keep": 0.9, "options": {"bits": bits}} | recipe


BASES = {f"trellis {bits}": trellis(bits) for bits in (4, 3, 2)} | {
    f"rotated {bits}": rotated(bits) for bits in (4, 3, 2)
}
PARTS = {
    "dense Grams": {"sequential": False},
    "loss": {"gram": "loss"},
    "anchor .25": {"anchor": True, "anchor_share": 0.25},
    "anchor .5": {"anchor": True, "anchor_share": 0.5},
    "loss, anchor .25": {"gram": "loss", "anchor": True, "anchor_share": 0.25},
    "state 14": {"options": {"state": 14}},
    "state 12": {"options": {"state": 12}},
    "state 10": {"options": {"state": 10}},
    "8 inputs": {"options": {"inputs": 8}},
    "16 inputs": {"options": {"inputs": 16}},
    "no input scales": {"options": {"scales": False}},
    "block 64": {"options": {"block": 64}},
    "rounds 2": {"options": {"rounds": 2}},
    "sweeps 1": {"options": {"sweeps": 1}},
}


AUTO_PARTS = {
    "loss": {"gram": "loss"},
    "anchor .25": {"anchor": True, "anchor_share": 0.25},
    "loss, anchor .25": {"gram": "loss", "anchor": True, "anchor_share": 0.25},
    "integers": {"options": {"favour": "speed"}},
    "dense Grams": {"sequential": False},
    "tuned": {"refine": {"steps": 1, "output_steps": 300}},
    "loss, anchor .25, tuned": {
        "gram": "loss", "anchor": True, "anchor_share": 0.25, "refine": {"steps": 1, "output_steps": 300},
    },
}  # fmt: skip


def recipes() -> dict[str, dict[str, Any]]:
    """All rows: bases, and bases with a part changed, named ``base | part``; ``auto`` at some keeps."""
    rows = dict(BASES)
    for name, base in BASES.items():
        for part, change in PARTS.items():
            changed = base | change
            rows[f"{name} | {part}"] = changed | {"options": base["options"] | change.get("options", {})}
    for keep in (0.313, 0.27, 0.253, 0.2, 0.156, 0.14, 0.128):
        rows[f"auto {keep}"] = {"method": "auto", "keep": keep}
        for part, change in AUTO_PARTS.items():
            rows[f"auto {keep} | {part}"] = {"method": "auto", "keep": keep} | change
        rows[f"gptq {keep}"] = {"method": "gptq", "keep": keep}
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="jsonl; its last documents are validation text")
    parser.add_argument("--test", required=True, help="text that is reported")
    parser.add_argument("--second", required=True, help="jsonl of another kind; its last documents are validation text")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--rows", default="trellis 4;trellis 3;trellis 2", help="names, separated by semicolons")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--max-blocks", type=int, help="only the first blocks of every text")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after so long")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    begun, options, known = time.perf_counter(), arguments(), recipes()
    if options.list:
        print("\n".join(known))
        return
    device = resolve_device(options.device)
    dense, tokenizer = open_model(options.model)
    dense = dense.to(device) if device.type == "cuda" else dense.float()
    calibration = read_texts(options.calibration).documents
    second = read_texts(options.second).documents
    texts = {
        "test": read_texts(options.test),
        "second": Texts(second[:-HELD_OUT], options.second),
        "valid": Texts(calibration[-HELD_OUT:], options.calibration),
        "valid second": Texts(second[-HELD_OUT:], options.second),
    }
    blocks = {name: stream(text, tokenizer, options.max_blocks, options.seq_len) for name, text in texts.items()}
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": device_name(device),
        "versions": versions(),
        "seed": options.seed,
        "blocks": {name: len(ids) for name, ids in blocks.items()},
        "dense": {name: measured(dense, dense, ids, device) for name, ids in blocks.items()},
        "rows": [],
    }
    if options.out.exists():
        result["rows"] = json.loads(options.out.read_text())["rows"]
    have = {row["row"] for row in result["rows"]}
    settings = {"calibration": {"samples": options.samples, "seq_len": options.seq_len}, "device": options.device}
    for name in options.rows.split(";"):
        if name in have or time.perf_counter() - begun > options.seconds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = compress(
                options.model, Path(folder, "out"), calibration=list(calibration[:-HELD_OUT]), seed=options.seed,
                recipe=settings | known[name],
            ).report  # fmt: skip
            seconds = time.perf_counter() - start
            model, _ = load(Path(folder, "out"), compose=True)
        model = model.to(device) if device.type == "cuda" else model.float()
        row = {"row": name, "recipe": known[name], "bits": round(16 * report["keep_actual"], 4)}
        row |= {"file_bytes": report["file_bytes"], "seconds": round(seconds, 1), "phases": report["seconds"]}
        row |= {"peak": {key: report[key] for key in ("peak_memory_bytes", "peak_device_bytes")}}
        row |= {text: measured(model, dense, ids, device) for text, ids in blocks.items()}
        result["rows"].append(row)
        shown = " ".join(f"{text} {row[text]['perplexity']:.3f} {row[text]['kl']:.4f}" for text in blocks)
        print(f"{name} | {row['bits']} bits | {shown} | {seconds:.1f} s", flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
