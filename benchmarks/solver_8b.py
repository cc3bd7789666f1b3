"""Seconds of the default solver on the shapes of an 8B Llama: one layer of each kind, and 32 layers by extrapolation.

Random weights with a decaying spectrum and anisotropic inputs; the share of time in each step is measured by running
the steps alone. Usage: python benchmarks/solver_8b.py OUT.json [--keep 0.6] [--device cuda]
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from cospadi.methods import GroupShape, Problem, get_method
from cospadi.solvers.pursuit import gradient_steps, initial_dictionary, keep_largest, least_squares_dictionary
from cospadi.solvers.whitening import ridge_whitening

GROUPS = {
    "q+k+v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate+up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}


def clock(device, work):
    """Seconds of `work`, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun, result


def problem(d_in, d_out, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    scale = torch.arange(1, d_in + 1, device=device, dtype=torch.float32) ** -0.4
    weights = tuple(
        scale[:, None] * torch.randn(d_in, n, device=device, generator=generator) / d_in**0.5 for n in d_out
    )
    inputs = torch.randn(2 * d_in, d_in, device=device, generator=generator)
    inputs *= torch.logspace(0.5, -1.5, d_in, device=device)[torch.randperm(d_in, device=device, generator=generator)]
    gram = (inputs.T @ inputs).double() / len(inputs)
    return Problem("group", weights, (gram,), seed=seed)


def measure(name, keep, device):
    d_in, d_out = GROUPS[name]
    method = get_method("pursuit")
    shape = GroupShape(tuple(f"m{i}" for i in range(len(d_out))), d_in, d_out)
    spec = method.spec(shape, int(keep * shape.dense_bytes), {})
    case = problem(d_in, d_out, device)
    total, factors = clock(device, lambda: method.factorise(case, spec, {}))
    options = method.check({})
    rounds, steps = int(options["rounds"]), int(options["steps"])
    whiten, whitening = clock(device, lambda: ridge_whitening(case.grams[0]))
    target = whitening.apply(torch.cat(case.weights, 1).double()).float()
    start, dictionary = clock(device, lambda: initial_dictionary(target, spec.atoms, torch.Generator().manual_seed(0)))
    gram, right = dictionary.T @ dictionary, target.T @ dictionary
    project, mask = clock(device, lambda: keep_largest(right, 0, spec.codes.pattern))
    codes = right * mask
    step, _ = clock(device, lambda: gradient_steps(codes, gram, right, 1.5, steps, 0, spec.codes.pattern))
    update, _ = clock(device, lambda: least_squares_dictionary(target, codes))
    return {
        "group": name,
        "d_in": d_in,
        "d_out": list(d_out),
        "atoms": spec.atoms,
        "nonzeros": spec.codes.nonzeros,
        "seconds": total,
        "error": factors.info["whitened_error"],
        "steps": {
            "whitening": whiten,
            "start": start,
            "gradient_steps": rounds * step,
            "of_which_projection": rounds * steps * project,
            "dictionary_updates": rounds * update,
        },
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    for name in GROUPS:
        rows.append(measure(name, arguments.keep, device))
        print(name, f"{rows[-1]['seconds']:.2f} s", {k: round(v, 2) for k, v in rows[-1]["steps"].items()}, flush=True)
    total = 32 * sum(row["seconds"] for row in rows)
    print(f"32 layers: {total:.0f} s")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    data = {
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": f"python benchmarks/solver_8b.py OUT --keep {arguments.keep} --device {device.type}",
        "seed": 0,
        "keep": arguments.keep,
        "groups": rows,
        "seconds_32_layers": total,
    }
    arguments.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
