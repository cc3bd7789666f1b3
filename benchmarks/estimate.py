"""What `cospadi estimate` guesses, beside the runs that its constants were fitted to or checked with.

    python benchmarks/estimate.py

Needs no GPU: the speed of the machine of each run is given, not measured. Prints the table and exits with 1 if a guess
is off by more than a factor of two.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LlamaConfig

from cospadi import Recipe
from cospadi.embedded import model_path
from cospadi.engine.estimate.estimate import phases
from cospadi.engine.estimate.speed import START, Speed
from cospadi.engine.plan.plan import make_plan
from cospadi.model_view import ModelView, discover, open_config, skeleton

SPEEDS = {
    "two CPU cores": Speed("cpu", 150e9, 150e9, 31e9),
    "H200": Speed("cuda", 50e12, 600e12, 4e12),
    "H100": Speed("cuda", 50e12, 600e12, 3e12),
}
SHORT, MIDDLE, LONG = ({"samples": n, "seq_len": length} for n, length in ((64, 512), (128, 1024), (256, 1024)))
SMALL, CORES, FLOATS = "llama-29m", "two CPU cores", {"bits": 16}
RUNS: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    (SMALL, CORES, {"method": "pursuit", "keep": 0.8}, {"calibrate": 175, "factorise": 109}),
    (SMALL, CORES, {"method": "cospadi", "keep": 0.8}, {"calibrate": 175, "factorise": 9 * 1200}),
    (SMALL, "H200", {"method": "pursuit", "keep": 0.8, "options": {"rounds": 30}},
     {"calibrate": 4.0, "factorise": 5.2}),
    (SMALL, "H200", {"method": "cospadi", "keep": 0.8}, {"calibrate": 4.0, "factorise": 350}),
    (SMALL, "H100", {"keep": 0.4, "calibration": SHORT}, {"allocate": 6.9, "factorise": 1.5}),
    (SMALL, "H100", {"keep": 0.27, "calibration": SHORT}, {"allocate": 9, "factorise": 1.7}),
    (SMALL, "H100", {"keep": 0.14, "calibration": SHORT}, {"allocate": 10.1, "factorise": 3.0}),
    ("embedded", CORES, {"keep": 0.4, "calibration": SHORT}, {"allocate": 16.0, "factorise": 6.3}),
    ("embedded", CORES, {"keep": 0.2, "calibration": SHORT}, {"allocate": 18.0, "factorise": 7.5}),
    ("4 layers of 8B", "H100", {"keep": 0.4, "calibration": MIDDLE}, {"allocate": 66, "factorise": 22.5}),
    (SMALL, CORES, {"keep": 0.4, "options": FLOATS, "calibration": LONG}, {"allocate+factorise": 170}),
    (SMALL, CORES, {"keep": 0.6, "options": FLOATS, "calibration": LONG}, {"allocate+factorise": 305}),
    (SMALL, CORES, {"keep": 0.8, "options": FLOATS, "calibration": LONG}, {"allocate+factorise": 163}),
    (SMALL, "H100", {"keep": 0.6, "options": FLOATS, "calibration": LONG}, {"allocate+factorise": 36}),
    (SMALL, CORES, {"keep": 0.27, "calibration": SHORT}, {"calibrate+allocate+factorise": 227}),
    ("2 layers of 8B", "H100", {"keep": 0.6, "options": FLOATS, "calibration": MIDDLE},
     {"allocate": 46.6, "factorise": 42.7}),
]  # fmt: skip
"""Model, machine, recipe, and the measured seconds of some phases."""


def model(name: str) -> ModelView:
    """A model on ``meta``: the shapes of those that were measured."""
    if name == "embedded":
        return discover(skeleton(open_config(model_path())))
    large = name.endswith("8B")
    sizes = {
        "vocab_size": 4096 if large else 8192,
        "hidden_size": 4096 if large else 512,
        "intermediate_size": 14336 if large else 1344,
        "num_hidden_layers": int(name.split()[0]) if large else 9,
        "num_attention_heads": 32 if large else 8,
        "num_key_value_heads": 8 if large else 2,
        "tie_word_embeddings": not large,
    }
    return discover(skeleton(LlamaConfig(**sizes, dtype=torch.bfloat16)))


def main() -> int:
    """Print guess, measurement and their quotient of every run."""
    worst = 1.0
    for name, machine, fields, measured in RUNS:
        view, recipe, speed = model(name), Recipe(**fields), SPEEDS[machine]
        work = phases(view, make_plan(view, recipe), recipe)
        for phase, seconds in measured.items():
            parts = [work[part] for part in phase.split("+")]
            guess = sum(START[speed.kind] + speed.seconds(part) for part in parts if part is not None)
            worst = max(worst, guess / seconds, seconds / guess)
            print(
                f"{name:<15}{machine:<15}{recipe.method:<9}keep {recipe.keep:<5}{phase:<29}"
                f"{guess:>9.1f} s guessed {seconds:>9.1f} s measured  {guess / seconds:.2f}"
            )
    print(f"worst quotient {worst:.2f}")
    return int(worst > 2)


if __name__ == "__main__":
    sys.exit(main())
