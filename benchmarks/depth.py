"""All pruning methods at 1, 2 and 3 removed blocks beside factorisation at the same bytes.

    python benchmarks/depth.py MODEL --calibration FILE --text FILE [--tasks PATH] [--tasks-limit N] --out JSON

A row of a pruning method removes exactly that many blocks; factorisation (`pursuit`, `svd_llm`) keeps the same share of
the linear layers' bytes. Distances of all pairs of blocks are computed once. Finished rows lie in the work directory
beside the JSON file, so an interrupted run goes on. The last line is the result as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

from cospadi.evaluation import compare
from cospadi.model_view import open_config
from cospadi.recipe import Recipe
from cospadi.report import ProgressDisplay
from cospadi.report.comparison import write_comparison
from cospadi.report.text import publishable

PRUNING = "uidl,shortgpt,llm_streamline,sleb,laco,magnitude,random,replaceme"
FACTORISATION = "pursuit,svd_llm"
VARIANTS = {
    "replaceme_cosine": {"solver": "cosine"},
    "replaceme_orthonormal": {"structure": "orthonormal"},
    "replaceme_diagonal": {"structure": "diagonal"},
    "replaceme_separate": {"separate": True},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="WikiText-2 raw, test part")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tasks", default="", help="task files with commas")
    parser.add_argument("--tasks-limit", type=int)
    parser.add_argument("--blocks", default="1,2,3", help="how many blocks go")
    parser.add_argument("--methods", default=f"{PRUNING},slicegpt,llm_pruner,{FACTORISATION}")
    parser.add_argument("--no-variants", action="store_true", help="least squares alone of ReplaceMe")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--max-blocks", type=int, help="only the first blocks of the text")
    parser.add_argument("--arithmetic", default="float32", help="float32, or model: the checkpoint's own float type")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def variants() -> dict[str, Recipe]:
    """Rows of ReplaceMe with other options: a section ``prune`` without a size only prunes, to each keep."""
    return {name: Recipe().merged({"prune": {"method": "replaceme", "options": o}}) for name, o in VARIANTS.items()}


def share(blocks: int, total: int) -> float:
    """The share of bytes that is left when so many equal blocks go, a hair above so that rounding never adds one."""
    return round((total - blocks) / total + 5e-5, 4)


def main() -> None:
    options = arguments()
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
            methods=options.methods.split(","),
            keeps=[share(blocks, total) for blocks in counts],
            text={Path(options.text).name: options.text},
            recipe=base,
            recipes={} if options.no_variants else variants(),
            references=(),
            max_blocks=options.max_blocks,
            arithmetic=options.arithmetic,
            tasks=[task for task in options.tasks.split(",") if task],
            limit=options.tasks_limit,
            progress=display.update,
            command=" ".join(["python", *sys.argv]),
        )
    options.out.write_text(json.dumps(publishable(data), indent=1) + "\n", encoding="utf-8")
    write_comparison(data, work)
    print(json.dumps(publishable(data)))


if __name__ == "__main__":
    main()
