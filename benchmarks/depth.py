"""Compare all pruning methods at 1, 2 and 3 removed blocks with factorisation at the same bytes.

    python benchmarks/depth.py MODEL --calibration FILE --text FILE FILE [--tasks PATH] --out JSON
    python benchmarks/depth.py MODEL … --methods uidl,sleb --variants "" --out PART.json     (one of several processes)
    python benchmarks/depth.py --merge PART.json PART.json … --out JSON

A row of a pruning method removes exactly that many blocks (one more where `separate` adds a matrix). Factorisation
(`pursuit`, `svd_llm`) keeps the same share of the linear layers' bytes. Distances of all pairs of blocks are computed
once. Finished rows are stored in the work directory beside the JSON file, so an interrupted run resumes. The last line
of output is the result as JSON.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from cospadi.evaluation import compare
from cospadi.model_view import open_config
from cospadi.recipe import Recipe
from cospadi.report import ProgressDisplay
from cospadi.report.comparison import write_comparison
from cospadi.report.text import publishable

PRUNING = "uidl,shortgpt,llm_streamline,sleb,laco,magnitude,random,replaceme"
FACTORISATION = "pursuit,svd_llm"
PUBLISHED = {"structure": "full", "select": "cosine", "relative": False}
VARIANTS = {
    "replaceme_full": {"structure": "full"},
    "replaceme_down": {"fold": "down"},
    "replaceme_nearest": {"select": "cosine"},
    "replaceme_down_nearest": {"fold": "down", "select": "cosine"},
    "replaceme_error": {"select": "error"},
    "replaceme_two": {"transforms": 2},
    "replaceme_published": PUBLISHED | {"ridge": 0.0},
    "replaceme_cosine": {"solver": "cosine"},
    "replaceme_cosine_published": PUBLISHED | {"solver": "cosine"},
    "replaceme_diagonal": {"structure": "diagonal"},
    "replaceme_low_rank": {"structure": "low_rank"},
    "replaceme_separate": {"separate": True},
}
SAME = 1e-4
"""Relative difference of dense perplexities that rounding on a GPU explains."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", help="JSON files of parts of one comparison")
    parser.add_argument("--calibration")
    parser.add_argument("--text", nargs="+", help="evaluation texts; the first is WikiText-2 raw, test part")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tasks", default="", help="task files, separated by commas")
    parser.add_argument("--tasks-limit", type=int, help="number of pairs per task file, from its paradigms in turn")
    parser.add_argument("--blocks", default="1,2,3", help="numbers of blocks to remove")
    parser.add_argument("--methods", default=f"{PRUNING},slicegpt,llm_pruner,{FACTORISATION}")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="ReplaceMe with other options")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--max-blocks", type=int, help="only the first blocks of the text")
    parser.add_argument("--arithmetic", default="float32", help="float32, or model: the checkpoint's own float type")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.merge and not (options.model and options.calibration and options.text):
        parser.error("name MODEL, --calibration and --text, or --merge")
    return options


def variants(names: list[str]) -> dict[str, Recipe]:
    """Rows of ReplaceMe with other options: a ``prune`` section without a size only prunes, to each keep."""
    return {name: Recipe().merged({"prune": {"method": "replaceme", "options": VARIANTS[name]}}) for name in names}


def listed(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def merged(paths: list[Path]) -> dict[str, Any]:
    """Merge the rows of several processes into one table.

    Raises:
        SystemExit: if their settings or dense figures differ.
    """
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first, rows = parts[0], []
    for path, part in zip(paths, parts, strict=True):
        for key in ("model", "measured", "text", "seq_len", "max_blocks", "calibration", "seed", "device", "versions"):
            if part.get(key) != first.get(key):
                raise SystemExit(f"{path}: its {key!r} is not that of {paths[0]}")
        dense, expected = part["dense"]["perplexity"], first["dense"]["perplexity"]
        if not math.isclose(dense, expected, rel_tol=SAME):
            raise SystemExit(f"{path}: its dense perplexity is {dense}, that of {paths[0]} is {expected}")
        rows += part["rows"]
    rows.sort(key=lambda row: -row["keep"])
    commands = [part.get("command", "") for part in parts]
    return first | {"rows": rows, "command": commands, "seconds_of_parts": [part.get("seconds") for part in parts]}


def share(blocks: int, total: int) -> float:
    """The share of bytes left without `blocks` equal blocks, slightly above so that rounding never removes one more."""
    return round((total - blocks) / total + 5e-5, 4)


def finish(data: dict[str, Any], out: Path) -> None:
    """Write the JSON file, and the table and plot beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(publishable(data), indent=1) + "\n", encoding="utf-8")
    write_comparison(data, out.with_suffix(""))
    print(json.dumps(publishable(data)))


def main() -> None:
    options = arguments()
    if options.merge:
        finish(merged(options.merge), options.out)
        return
    total = open_config(options.model).num_hidden_layers
    counts = [int(count) for count in options.blocks.split(",")]
    base = Recipe().merged(
        {
            "calibration": {
                "source": options.calibration,
                "samples": options.samples,
                "seq_len": options.seq_len,
            },
            "device": options.device,
            "seed": options.seed,
        }
    )
    work = options.out.with_suffix("")
    with ProgressDisplay() as display:
        data = compare(
            options.model,
            work,
            methods=listed(options.methods),
            keeps=[share(blocks, total) for blocks in counts],
            text={Path(path).name: path for path in options.text},
            recipe=base,
            recipes=variants(listed(options.variants)),
            references=(),
            max_blocks=options.max_blocks,
            arithmetic=options.arithmetic,
            tasks=listed(options.tasks),
            limit=options.tasks_limit,
            progress=display.update,
            command=" ".join(["python", *sys.argv]),
        )
    finish(data, options.out)


if __name__ == "__main__":
    main()
