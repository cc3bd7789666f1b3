"""Memory and time per token of a checkpoint with shared atoms (MASA): weights composed once, or at every call.

Three ways: the original model, the compressed one with its weights composed while loading (``compose=True``: an
ordinary dense model), and with weights composed at every call. Decoding goes on from a cache, one token at a time; the
prompt is one forward pass. Usage: python benchmarks/masa_inference.py DENSE COMPRESSED OUT.json
"""

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import cospadi
from cospadi.checkpoint.formats.shared import read_shared_config
from cospadi.evaluation import weight_bytes


def clock(device, work):
    """Seconds of `work`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


@torch.no_grad()
def decode(model, ids, tokens):
    """Feed one token at a time, as generation does."""
    cache = model(ids, use_cache=True).past_key_values
    for _ in range(tokens):
        model(ids[:, -1:], past_key_values=cache, use_cache=True)


@torch.no_grad()
def measure(name, path, device, dtype, tokens, repeats, **options):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model, _ = cospadi.load(path, device=str(device), dtype=dtype, **options)
    ids = torch.arange(1, 257, device=device)[None] % model.config.vocab_size
    decode(model, ids[:, :16], 4)  # warms up
    prompt = [clock(device, lambda: model(ids, use_cache=False)) for _ in range(repeats)]
    start = [clock(device, lambda: decode(model, ids[:, :16], 0)) for _ in range(repeats)]
    whole = [clock(device, lambda: decode(model, ids[:, :16], tokens)) for _ in range(repeats)]
    attention = sum(
        p.numel() * p.element_size()
        for n, m in model.named_modules()
        if n.endswith("_attn") or n.endswith("attention")
        for p in m.parameters()
    )
    return {
        "name": name,
        "weight_bytes": weight_bytes(model),
        "attention_bytes": attention,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "milliseconds_per_token": 1e3 * (statistics.median(whole) - statistics.median(start)) / tokens,
        "prompt_milliseconds": 1e3 * statistics.median(prompt),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dense", type=Path)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    ways = [
        ("original", arguments.dense, {}),
        ("composed once", arguments.compressed, {"compose": True}),
        ("composed at every call", arguments.compressed, {}),
    ]
    rows = []
    for name, path, options in ways:
        rows.append(measure(name, path, device, dtype, arguments.tokens, arguments.repeats, **options))
        row = rows[-1]
        print(
            f"{name:24} {row['weight_bytes'] / 1e6:9.2f} MB  attention {row['attention_bytes'] / 1e6:8.2f} MB  "
            f"{row['milliseconds_per_token']:7.2f} ms/token  prompt of 256 {row['prompt_milliseconds']:7.1f} ms",
            flush=True,
        )
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    specs = read_shared_config(arguments.compressed)
    data = {
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": f"python -P benchmarks/masa_inference.py DENSE COMPRESSED OUT --device {device.type} "
        f"--dtype {arguments.dtype} --tokens {arguments.tokens} --repeats {arguments.repeats}",
        "model": arguments.dense.name,
        "groups": [spec.row() for spec in specs],
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
