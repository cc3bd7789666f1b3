"""Compress a model from Python and read the report. Runs offline on the small model inside the package."""

import sys

from cospadi import Recipe, compress
from cospadi.embedded import model_path, stdlib_texts

out = sys.argv[1] if len(sys.argv) > 1 else "example-output/compressed"

# The model may be any local directory or hub id, and the calibration text a .txt or .jsonl file. A Recipe takes the
# same keys as a recipe file. The defaults are the method `auto` and 256 sequences of 1024 tokens.
recipe = Recipe(
    method="pursuit",
    keep=0.7,
    options={"rounds": 3},
    allocation="uniform",
    calibration={"samples": 16, "seq_len": 256},
)
result = compress(model_path(), out, recipe=recipe, calibration=stdlib_texts("calibration")[:4])

report = result.report
print(f"kept {result.keep_actual:.1%} of {report['bytes_before']:,} bytes in {report['seconds']['total']:.0f} s")
worst = max(report["groups"], key=lambda group: group["error"])
print(f"largest output error: {worst['error']:.2%} in {worst['name']}")
