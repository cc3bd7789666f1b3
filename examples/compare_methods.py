"""Compare two methods, and plain quantisation, at the same number of bytes: table, CSV, plot and page."""

import sys

from rich.console import Console

from cospadi import Recipe
from cospadi.embedded import model_path, stdlib_texts
from cospadi.evaluation import compare
from cospadi.report import print_comparison
from cospadi.report.comparison import all_rows, write_comparison

out = sys.argv[1] if len(sys.argv) > 1 else "example-output/comparison"
comparison = compare(
    model_path(),
    out,
    methods=["svd", "svd_llm"],
    keeps=[0.8, 0.6],
    text=stdlib_texts("heldout")[:1],
    calibration=stdlib_texts("calibration")[:4],
    recipe=Recipe(calibration={"samples": 16, "seq_len": 256}),
    seq_len=256,
    max_blocks=2,
)
print_comparison(all_rows(comparison), Console(), comparison["dense"])
for path in write_comparison(comparison, out).values():
    print(path)
