"""Add a method: one decorated function, whose keyword-only arguments become options of recipes and of `--set`."""

import sys

import torch

from cospadi import Recipe, compress
from cospadi.embedded import model_path, stdlib_texts
from cospadi.format import Factors, GroupSpec, Stored
from cospadi.methods import Problem, method
from cospadi.methods.sizing import low_rank_plan


@method("scaled_svd", plan=low_rank_plan)
def scaled_svd(problem: Problem, spec: GroupSpec, *, power: float = 0.5) -> Factors:
    """SVD of the weights, with each input scaled by a power of its energy."""
    weight = torch.cat(problem.weights, 1)  # (d_in, d_out of all modules)
    scale = problem.grams[0].diagonal().clamp_min(1e-12).pow(power / 2).to(weight)
    left, values, right = torch.linalg.svd(scale[:, None] * weight, full_matrices=False)
    rank = spec.atoms
    dictionary = (left[:, :rank] * values[:rank]) / scale[:, None]  # D (d_in, rank)
    return Factors(codes=Stored(right[:rank].T), dictionary=Stored(dictionary.T))  # outputs and atoms in rows


out = sys.argv[1] if len(sys.argv) > 1 else "example-output/scaled_svd"
for power in (0.0, 1.0):
    options = {"method": "scaled_svd", "options": {"power": power}, "keep": 0.7}
    recipe = Recipe(**options, calibration={"samples": 16, "seq_len": 256})
    result = compress(model_path(), f"{out}-{power:g}", calibration=stdlib_texts("calibration")[:4], recipe=recipe)
    groups = result.report["groups"]
    print(f"power {power:g}: output error {sum(g['missed'] for g in groups) / sum(g['energy'] for g in groups):.2%}")
