"""Tiles a second of the trellis encoder, by bits and state.

    python benchmarks/encode_trellis.py --out JSON [--bits 2 3 4] [--state 10 12 16] [--warps 8 16] [--per-thread 2 4]

On CUDA every setting of the kernel is tried and checked against the PyTorch search on a few tiles: `cost` is the ratio
of the errors. SmolLM2-135M has 414,720 tiles of 256 values, an 8B model about 27 million. Error feedback encodes one
block of columns at a time: `--tiles 16` shows how long few tiles take.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from cospadi.runtime.devices import device_name
from cospadi.runtime.fingerprints import versions
from cospadi.solvers import triton_trellis
from cospadi.solvers.trellis import _search, decode, encode, margin, spread

CHECKED = 4


def seconds(targets: Tensor, bits: int, state: int) -> float:
    """Least time of three encodings."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        encode(targets, bits, state).cpu()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--state", type=int, nargs="+", default=[10, 12, 16])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tiles", type=int, help="per call; default 8,192 on CUDA, on a CPU as many as take a second")
    parser.add_argument("--warps", type=int, nargs="+", default=[0], help="0: as the encoder chooses")
    parser.add_argument("--per-thread", type=int, nargs="+", default=[triton_trellis.PER_THREAD])
    parser.add_argument("--per-sm", type=int, nargs="+", default=[triton_trellis.PER_SM])
    parser.add_argument("--dp4a", type=int, nargs="+", default=[int(triton_trellis.DP4A)])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device(given.device)
    cuda = device.type == "cuda"
    report = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "size": given.size,
        "rows": [],
    }
    settings, chosen = [(0, 0, 0, 0)], (triton_trellis.WARPS, triton_trellis.FEW_WARPS)
    if cuda:
        settings = list(itertools.product(given.warps, given.per_thread, given.per_sm, given.dp4a))
    for bits, state, (warps, per_thread, per_sm, dp4a) in itertools.product(given.bits, given.state, settings):
        count = given.tiles or (8192 if cuda else max(16, 2**21 >> state))
        generator = torch.Generator().manual_seed(0)
        targets = spread(state) * torch.randn(count, given.size, generator=generator).to(device)
        row = {"bits": bits, "state": state, "tiles": count}
        if cuda:
            triton_trellis.WARPS, triton_trellis.FEW_WARPS = (warps, warps) if warps else chosen
            triton_trellis.PER_THREAD, triton_trellis.PER_SM = per_thread, per_sm
            triton_trellis.DP4A = bool(dp4a)
            row |= {"warps": warps, "per_thread": per_thread, "per_sm": per_sm, "dp4a": dp4a}
            start = time.perf_counter()
        try:
            symbols = encode(targets[:CHECKED], bits, state)
        except Exception as error:  # out of registers, shared or device memory
            report["rows"].append(row | {"failed": str(error)[:200]})
            continue
        if cuda:
            row["first_call"] = round(time.perf_counter() - start, 2)
            right = _search(targets[:CHECKED], None, bits, state, margin(bits, state, given.size))
            errors = [
                (decode(item, bits, state) - targets[:CHECKED]).double().square().sum() for item in (symbols, right)
            ]
            row["cost"] = round(float(errors[0] / errors[1]), 5)
        taken = seconds(targets, bits, state)
        missed = (decode(encode(targets, bits, state), bits, state) - targets).square().sum() / targets.square().sum()
        row |= {"tiles_per_second": round(count / taken, 1), "distortion": round(float(missed), 5)}
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
