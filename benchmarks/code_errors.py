"""Errors that codes of 2 to 4 bits leave in the outputs of one decoder layer's matrices.

    python benchmarks/code_errors.py MODEL --calibration FILE --layer 10 --out JSON

Every code is solved under the Gram of calibration text, dense model before the layer. The number is the squared error
of a matrix's outputs on that text over their squared size, in per cent; `all` is the mean over the matrices. Bits count
all that is stored: scales, zero points, signs. Rows already in the output file are kept.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cospadi.calibration import read_texts, token_blocks
from cospadi.calibration.statistics import Accumulator
from cospadi.model_view import LayerReplay, ModelView, discover, open_model
from cospadi.runtime.fingerprints import versions
from cospadi.solvers.quantise import quantise_rows
from cospadi.solvers.rescale import rescaled
from cospadi.solvers.rotate import input_scales, random_signs, rotated_gram, rotated_rows
from cospadi.solvers.trellis_rows import Problem, TrellisCode, trellis_many

BLOCK = 128
Solved = tuple[Tensor, float]
"""A matrix and its stored bits."""
Solver = Callable[[list[Tensor], Tensor], list[Solved]]
"""Solves the matrices that share an input, given its Gram."""


def integers(
    rows: Tensor, gram: Tensor, bits: int, *, group: int, symmetric: bool, half: bool, weight: float
) -> Solved:
    found = quantise_rows(
        rows,
        bits=bits,
        group=group,
        symmetric=symmetric,
        hessian=gram,
        search=30,
        shifts=2 if half else 1,
        sweeps=2,
        weighting=weight,
        half=half,
    )
    found = rescaled(rows, found, bits=bits, group=group, hessian=gram, rounds=3, half=half)
    extra = 16 + (0 if symmetric else bits + half)
    return found.matrix, rows.numel() * bits + found.scales.numel() * extra


def each(solve: Callable[[Tensor, Tensor], Solved]) -> Solver:
    """Matrices that share an input, one by one."""
    return lambda parts, gram: [solve(rows, gram) for rows in parts]


def trellis(state: int, inputs: int, rounds: int = 1, sweeps: int = 0) -> Callable[[int], Solver]:
    """Tiles of `inputs` columns and 256 values, the matrices that share an input side by side."""

    def solver(bits: int) -> Solver:
        code = TrellisCode(bits, state, inputs, 256 // inputs)

        def solve(parts: list[Tensor], gram: Tensor) -> list[Solved]:
            found = trellis_many([Problem(rows, gram) for rows in parts], code, rounds=rounds, sweeps=sweeps)
            return [(item.matrix, item.symbols.numel() * bits + 16 * item.scales.numel()) for item in found]

        return solve

    return solver


def codes(bits: int) -> dict[str, tuple[bool, Solver]]:
    """Of each code whether it reads the rotated input, and its solver."""
    found = {
        f"trellis L={state} {inputs}x{256 // inputs}": (True, trellis(state, inputs)(bits))
        for state in (10, 12)
        for inputs in (4, 8, 16)
    }
    groups = partial(integers, bits=bits, group=64, symmetric=False, weight=1.0)
    rotated = partial(integers, bits=bits, group=0, symmetric=True, half=True, weight=0.0)
    return {
        "rotated integers": (True, each(rotated)),
        "integers g64": (False, each(partial(groups, half=False))),
        "integers g64, half zeros": (False, each(partial(groups, half=True))),
        **found,
        "trellis L=10 4x64, 2 rounds": (True, trellis(10, 4, rounds=2)(bits)),
        "trellis L=10 4x64, 1 sweep": (True, trellis(10, 4, sweeps=1)(bits)),
        "trellis L=10 4x64, 2 sweeps": (True, trellis(10, 4, sweeps=2)(bits)),
    }


@torch.no_grad()
def grams(view: ModelView, ids: Tensor, index: int) -> dict[str, Tensor]:
    """The Gram that each matrix of a layer sees."""
    groups = list(view.of_layer(index))
    sums = {group.name: Accumulator(group.name, group.d_in, torch.device("cpu")) for group in groups}
    with LayerReplay(view, torch.device("cpu")) as replay:
        for part in ids.split(8):
            hidden = replay.embed(part)
            for before in range(index):
                hidden = replay.layer(before, hidden)
            handles = [
                view.module(group.modules[0]).register_forward_pre_hook(
                    lambda _, args, group=group: sums[group.name].add(args[0])
                )
                for group in groups
            ]
            replay.layer(index, hidden)
            for handle in handles:
                handle.remove()
    return {group.name: sums[group.name].finish().mean_gram for group in groups}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--only", help="part of the names of the codes to run")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = open_model(given.model)
    view = discover(model)
    blocks = token_blocks(read_texts(given.calibration), tokenizer, samples=given.samples, seq_len=given.seq_len)
    found = grams(view, blocks.ids, given.layer)
    report = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    report |= {"layer": given.layer, "samples": given.samples, "seq_len": given.seq_len, "versions": versions()}
    done = {(row["code"], row["bits"]) for row in report["rows"]}
    for bits in given.bits:
        for name, (rotate, solve) in codes(bits).items():
            if (name, bits) in done or (given.only and given.only not in name):
                continue
            row = measured(view, given.layer, found, rotate, solve)
            report["rows"].append({"code": name, "bits": bits} | row)
            print(json.dumps(report["rows"][-1]), flush=True)
            given.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(view: ModelView, layer: int, found: dict[str, Tensor], rotate: bool, solve: Solver) -> dict[str, object]:
    """Errors, bits and time of one code."""
    start, stored, weights, errors = time.perf_counter(), 0.0, 0, {}
    for group in view.of_layer(layer):
        parts, gram = [view.module(module).weight.detach().float() for module in group.modules], found[group.name]
        if rotate:
            signs, scales = random_signs(group.d_in, 0), input_scales(torch.cat(parts))
            parts = [rotated_rows(part, signs, scales, BLOCK) for part in parts]
            gram = rotated_gram(gram, signs, scales, BLOCK)
            stored += 17 * group.d_in
        for module, part, (matrix, size) in zip(group.modules, parts, solve(parts, gram), strict=True):
            miss, whole = (part - matrix).double(), part.double()
            share = float(((miss @ gram) * miss).sum() / ((whole @ gram) * whole).sum())
            errors[module.rsplit(".", 1)[-1]] = round(100 * share, 4)
            stored, weights = stored + size, weights + part.numel()
    errors["all"] = round(sum(errors.values()) / len(errors), 4)
    seconds = round(time.perf_counter() - start, 1)
    return {"bits_per_weight": round(stored / weights, 4), "error": errors, "seconds": seconds}


if __name__ == "__main__":
    main()
