"""Compare two methods, and plain quantisation, at the same number of bytes: table, CSV, plot and page."""

import sys

from rich.console import Console

from cospadi import compare
from cospadi.embedded import model_path, stdlib_texts
from cospadi.report import print_comparison
from cospadi.report.comparison import all_rows

out = sys.argv[1] if len(sys.argv) > 1 else "example-output/comparison"
comparison = compare(
    model_path(),
    out,
    methods=["svd", "svd_llm"],
    keep=[0.8, 0.6],
    text=stdlib_texts("heldout")[:1],
    calibration=stdlib_texts("calibration")[:4],
    samples=16,
    seq_len=256,
    eval_seq_len=256,
    max_blocks=2,
)
print_comparison(all_rows(comparison), Console(), comparison["dense"])
for name in comparison["files"].values():
    print(f"{out}/{name}")
