"""What a pattern and the bits of the factors cost in perplexity, at the same atoms and non-zeros.

    python benchmarks/codes.py MODEL --calibration FILE --text FILE --out JSON [--keep 0.8,0.6]

Every row solves the default method's dictionaries with as many atoms and non-zeros as 16:32 codes of 16 bits have at
that keep; only where non-zeros may lie, or how many bits are stored, differs. Bytes therefore differ from row to row;
they are given. `ratio` is a row's perplexity over that of the row it is compared with (`against`).
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from cospadi.calibration import StatisticsStore, collect, read_texts, token_blocks
from cospadi.engine.context import RunContext
from cospadi.engine.factorise import factorise_group
from cospadi.engine.plan.plan import make_plan
from cospadi.evaluation.yardstick import Yardstick
from cospadi.format import MatrixSpec
from cospadi.model_view import discover, open_model
from cospadi.recipe import Recipe
from cospadi.runtime.devices import device_name, resolve_device, widened
from cospadi.runtime.fingerprints import versions

ROWS = {
    "free": ({"pattern": "free"}, {}, None),
    "16:32": ({"pattern": "16:32"}, {}, "free"),
    "8:16": ({"pattern": "8:16"}, {}, "free"),
    "4:8": ({"pattern": "4:8"}, {}, "free"),
    "2:4": ({"pattern": "2:4"}, {}, "free"),
    "16:32, 14-bit values": ({"pattern": "16:32", "bits": 14}, {}, "16:32"),
    "16:32, 8-bit values": ({"pattern": "16:32", "bits": 8, "group": 64}, {}, "16:32"),
    "16:32, 8-bit values and dictionary": (
        {"pattern": "16:32", "bits": 8, "group": 64},
        {"bits": 8, "group": 64},
        "16:32",
    ),
    "16:32, 4-bit values, 8-bit dictionary": (
        {"pattern": "16:32", "bits": 4, "group": 64},
        {"bits": 8, "group": 64},
        "16:32",
    ),
}


def changed(spec: MatrixSpec, change: dict) -> MatrixSpec:
    """A matrix of the same sizes and number of non-zeros, stored in another way."""
    if change.get("pattern") == "free":
        return replace(spec, pattern="free", nonzeros=spec.nonzeros)
    return replace(spec, nonzeros=0 if spec.sparse else spec.nonzeros, **change)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--keep", default="0.8,0.6")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--max-blocks", type=int, help="only the first blocks of the text")
    parser.add_argument("--rounds", type=int, help="of the solver")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = resolve_device(options.device)
    model, tokenizer = open_model(options.model)
    view = discover(model)
    texts = read_texts(options.calibration)
    blocks = token_blocks(texts, tokenizer, samples=options.samples, seq_len=options.seq_len, seed=options.seed)
    yardstick = Yardstick({Path(options.text).name: read_texts(options.text)}, max_blocks=options.max_blocks)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": device_name(device),
        "versions": versions(),
        "seed": options.seed,
        "calibration": blocks.report,
        "max_blocks": options.max_blocks,
        "rows": [],
    }

    def silent(*_: object) -> None:
        """Report nothing."""

    result["dense"] = yardstick.measure(model, tokenizer, device, silent)["perplexity"]
    solver = {} if options.rounds is None else {"rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        store = StatisticsStore(Path(folder), {"tokens": blocks.sha256})
        with widened(model, device):
            collect(view, blocks.ids, device=device, store=store)
        context = RunContext(view, store, blocks.ids, device, torch.bfloat16, options.seed, silent)
        for keep in (float(part) for part in options.keep.split(",")):
            recipe = Recipe(method="pursuit", keep=keep, options={"pattern": "16:32"})
            groups = make_plan(view, recipe).groups
            found: dict[str, float] = {}
            for name, (codes, dictionary, against) in ROWS.items():
                weights: dict[str, torch.Tensor] = {}
                size = missed = energy = 0.0
                for group in groups:
                    spec = replace(
                        group.spec,
                        codes=changed(group.spec.codes, codes),
                        dictionary=changed(group.spec.dictionary, dictionary),
                    )
                    packed, info = factorise_group(context, replace(group, spec=spec, options=solver))
                    parts = spec.weight(packed).T.float().split(list(spec.d_out))
                    weights |= {f"{m}.weight": p for m, p in zip(spec.modules, parts, strict=True)}
                    size, missed, energy = size + spec.bytes, missed + info["missed"], energy + info["energy"]
                lent = {name: tensor.to(device) for name, tensor in weights.items()}
                measured = yardstick.measure(model, tokenizer, device, silent, lambda _, lent=lent: lent)
                found[name] = measured["perplexity"]
                row = {
                    "keep": keep,
                    "codes": name,
                    "bytes": int(size),
                    "error": missed / energy,
                    "perplexity": found[name],
                    "against": against,
                    "ratio": found[name] / found[against] if against else None,
                }
                result["rows"].append(row)
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
