"""Speed of the operation beneath a compressed layer, against the ways one would otherwise spend the same bytes.

For every linear group of a few models, at some keeps and bit widths, and for decoding (1, 4, 16 tokens) and prefill
(2048): this operation with balanced 16:32 codes, the same with free codes (an unstructured bitmask), a dense 16-bit
layer, and two dense factors of the same bytes. Each is timed as replays of a CUDA graph whose calls go round several
copies of the weights, more than the second-level cache holds; medians over replays. Bandwidth is of the stored bytes,
beside that of a large device-to-device copy on the same card.

    python benchmarks/kernels.py --out kernels.json
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from cospadi.format import GroupSpec, MatrixSpec, Packed
from cospadi.kernels import cuda, factored_linear, reference, tuning
from cospadi.kernels.synthetic import random_packed

# outputs of q, k, v · o · gate, up · down, and their inputs
MODELS = {
    "Llama-3.2-1B": {"qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 16384), "down": (8192, 2048)},
    "Llama-3-8B": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "Qwen3-8B": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096)},
}
ROTATED_BYTES = 300e6
REPLAYS = 7


@dataclass(frozen=True)
class Layer:
    """Stored tensors of a group on the card."""

    spec: GroupSpec
    dictionary: Packed | None
    codes: Packed

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operation."""
        return factored_linear(x, self.dictionary, self.spec.dictionary, self.codes, self.spec.codes)


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call, from replays of one graph of all `calls`; the first runs outside warm up and tune."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    del kept
    return median(times[1:])


def copies(size: int) -> int:
    """How many copies of `size` bytes of weights to go round."""
    return max(2, min(48, round(ROTATED_BYTES / size) + 1))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device (outside a graph, where copies run slower)."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return 2 * source.numel() * 4 / median(times[1:])


def clone(packed: Packed | None) -> Packed | None:
    """A copy elsewhere in memory."""
    return None if packed is None else {role: tensor.clone() for role, tensor in packed.items()}


def make(spec: GroupSpec, count: int) -> list[Layer]:
    """`count` layers of a spec: one random, the others its copies."""
    first = Layer(
        spec,
        None if spec.dictionary is None else random_packed(spec.dictionary, device="cuda", seed=1),
        random_packed(spec.codes, device="cuda", seed=2),
    )
    codes = [clone(first.codes) or {} for _ in range(count - 1)]
    return [first, *(Layer(spec, clone(first.dictionary), c) for c in codes)]


def largest(make_spec: Callable[[int], GroupSpec], step: int, budget: int) -> GroupSpec:
    """The spec of the most atoms, in multiples of `step`, within `budget` bytes."""
    atoms = step
    while make_spec(atoms + step).bytes <= budget:
        atoms += step
    return make_spec(atoms)


def balanced_spec(d_in: int, d_out: int, width: int, budget: int) -> GroupSpec:
    """Codes 16:32 over a dictionary, both of `width` bits, atoms in whole mask words."""
    return largest(
        lambda k: GroupSpec(
            ("",), d_in, (d_out,), MatrixSpec(d_out, k, "16:32", 0, width), MatrixSpec(k, d_in, bits=width)
        ),
        32,
        budget,
    )


def low_rank_spec(d_in: int, d_out: int, budget: int) -> GroupSpec:
    """Two dense 16-bit factors."""
    return largest(lambda k: GroupSpec(("",), d_in, (d_out,), MatrixSpec(d_out, k), MatrixSpec(k, d_in)), 1, budget)


def unstructured(spec: GroupSpec) -> GroupSpec:
    """The same sizes without balance."""
    return replace(spec, codes=replace(spec.codes, pattern="free"))


def time_layers(spec: GroupSpec, tokens: int) -> float:
    """Microseconds of the operation."""
    layers = make(spec, copies(spec.bytes) if tokens <= 16 else 2)
    x = torch.randn(tokens, spec.d_in, device="cuda", dtype=torch.bfloat16)
    return graph_microseconds([partial(layer, x) for layer in layers])


def time_parts(spec: GroupSpec) -> tuple[float, float]:
    """Microseconds of the two products for one token: x D and (x D) S."""
    assert spec.dictionary is not None
    layers = make(spec, copies(spec.bytes))
    x = torch.randn(1, spec.d_in, device="cuda", dtype=torch.bfloat16)
    half = torch.bfloat16
    first = [partial(cuda.packed_linear, x, c.dictionary, spec.dictionary, half, spec.codes) for c in layers]
    hidden = first[0]()
    second = [partial(cuda.packed_linear, hidden, c.codes, spec.codes, half) for c in layers]
    return graph_microseconds(first), graph_microseconds(second)


def time_dense(d_in: int, d_out: int, tokens: int) -> float:
    """Microseconds of a dense 16-bit layer."""
    count = copies(2 * d_in * d_out) if tokens <= 16 else 2
    weights = [torch.randn(d_out, d_in, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
    return graph_microseconds([partial(linear, x, w) for w in weights])


def time_low_rank(spec: GroupSpec, tokens: int) -> float:
    """Microseconds of two dense 16-bit factors."""
    count = copies(spec.bytes) if tokens <= 16 else 2
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    factors = [
        (torch.randn(spec.atoms, spec.d_in, **kind), torch.randn(spec.codes.rows, spec.atoms, **kind))
        for _ in range(count)
    ]
    x = torch.randn(tokens, spec.d_in, **kind)
    return graph_microseconds([partial(lambda a, b: linear(linear(x, a), b), *pair) for pair in factors])


def relative_error(spec: GroupSpec, tokens: int) -> float:
    """Error of the operation against float64."""
    layer = make(spec, 1)[0]
    x = torch.randn(tokens, spec.d_in, device="cuda", dtype=torch.bfloat16)
    exact = reference(x, layer.dictionary, spec.dictionary, layer.codes, spec.codes)
    return float((layer(x).double() - exact).norm() / exact.norm())


def run(
    models: Sequence[str], keeps: Sequence[float], bits: Sequence[int], tokens: Sequence[int], copied: float
) -> Iterator[dict[str, Any]]:
    """All measurements, one at a time: shape, keep, bits and number of tokens."""
    dense: dict[tuple[int, int, int], float] = {}
    seen: set[tuple[int, int, float, int]] = set()
    for model in models:
        for name, (d_in, d_out) in MODELS[model].items():
            for keep in keeps:
                for width in bits:
                    if (d_in, d_out, keep, width) in seen:
                        continue
                    seen.add((d_in, d_out, keep, width))
                    budget = int(keep * 2 * d_in * d_out)
                    spec = balanced_spec(d_in, d_out, width, budget)
                    low = low_rank_spec(d_in, d_out, budget)
                    first, second = time_parts(spec)
                    for count in tokens:
                        if (d_in, d_out, count) not in dense:
                            dense[d_in, d_out, count] = time_dense(d_in, d_out, count)
                        row: dict[str, Any] = {
                            "model": model, "layer": name, "d_in": d_in, "d_out": d_out, "keep": keep, "bits": width,
                            "atoms": spec.atoms, "bytes": spec.bytes, "tokens": count,
                            "us": time_layers(spec, count),
                            "dense_us": dense[d_in, d_out, count],
                            "low_rank_us": time_low_rank(low, count),
                            "bitmask_us": time_layers(unstructured(spec), count),
                        }  # fmt: skip
                        if count == 1:
                            row |= {"dictionary_us": first, "codes_us": second, "codes_bytes": spec.codes.bytes}
                            row |= {"codes_of_copy": spec.codes.bytes / second * 1e6 / copied}
                            row |= {"error": relative_error(spec, count)}
                        yield row


def show(row: dict[str, Any], copied: float) -> None:
    """One line of the table."""
    rate = row["bytes"] / row["us"] * 1e6
    times = " ".join(f"{row[name]:7.1f}" for name in ("us", "dense_us", "low_rank_us", "bitmask_us"))
    line = f"{row['model']:13s}{row['layer']:9s} {row['keep']:4.1f} {row['bits']:4d} {row['tokens']:6d} | {times}   "
    line += f"| {row['us'] / row['dense_us']:8.2f} | {rate / 1e9:6.0f} {rate / copied:5.2f}"
    if row["tokens"] == 1:
        line += f"  D {row['dictionary_us']:.1f} S {row['codes_us']:.1f} ({row['codes_of_copy']:.2f})"
        line += f" err {row['error']:.1e}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 2048])
    parser.add_argument("--out", type=Path, help="write everything as JSON here")
    args = parser.parse_args()
    copied = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {copied / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "copy_bytes_per_second": copied,
        "rows": rows,
    }
    print("layer                  keep bits tokens |   ours   dense  lowrank  bitmask us | of dense | GB/s, of copy")
    for row in run(args.models, args.keep, args.bits, args.tokens, copied):
        rows.append(row)
        show(row, copied)
        if args.out:  # what there is so far, should the rest be cut off
            result["choices"] = {str(key): name for key, name in tuning.choices().items()}
            args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
