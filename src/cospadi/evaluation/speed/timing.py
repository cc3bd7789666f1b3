"""Interleaved timing: variants run round-robin, so clock changes and other load affect all of them equally.

On a GPU a variant is a CUDA graph of several calls, replayed between two events: launches then cost almost nothing, and
nothing waits for the host. On a CPU a variant is a few of the calls, different ones in each round, timed by a clock.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

import torch

Call = Callable[[], object]
WARM_UP = 2  # rounds that are not counted
CACHES_OVER = {"cuda": 6, "cpu": 2}  # bytes of weights cycled through, as a multiple of the largest cache
MOST_COPIES = 48
CPU_CALLS = 2  # per round: enough, because a call takes long
_CPU_CACHE = 32 << 20  # if the system does not tell
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 27}  # bytes, far beyond any cache


@dataclass(frozen=True)
class Timed:
    """Seconds per call, one number per round; the rounds of variants timed together correspond to each other."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the seconds per call."""
        return median(self.seconds)

    def over(self, other: Timed) -> float:
        """Median over the rounds of the ratio of this variant's time to the other's."""
        return median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def alternate(
    variants: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graphs: bool = True
) -> dict[str, Timed]:
    """Time variants round-robin.

    Args:
        variants: the calls of each variant that are timed together, usually the same one on copies of the weights.
        device: where they run.
        rounds: number of counted rounds.
        graphs: on a GPU, capture the calls in a CUDA graph; otherwise they are launched one by one.

    Returns:
        Seconds per call, by the names of the variants.
    """
    per_round = {name: len(calls) if device.type == "cuda" else CPU_CALLS for name, calls in variants.items()}
    if device.type == "cuda" and graphs:
        ready = {name: _graph(calls) for name, calls in variants.items()}
    else:
        ready = {name: _in_turn(calls, per_round[name]) for name, calls in variants.items()}
    found = _cuda_seconds(ready, rounds) if device.type == "cuda" else _cpu_seconds(ready, rounds)
    return {name: Timed(tuple(s / per_round[name] for s in seconds)) for name, seconds in found.items()}


def _in_turn(calls: Sequence[Call], count: int) -> Call:
    """A function that runs `count` of the calls, continuing where it last stopped."""
    turn = cycle(calls)

    def run() -> None:
        for call in islice(turn, count):
            call()

    return run


def _graph(calls: Sequence[Call]) -> Call:
    """The calls as one CUDA graph. They run once before the capture, so that kernels are compiled and chosen."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _cuda_seconds(ready: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ready}
    for turn in range(WARM_UP + rounds):
        for name, run in ready.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            stop.record()
            if turn >= WARM_UP:
                marks[name].append((start, stop))
    torch.cuda.synchronize()  # only once, so that the device never waits for the host between variants
    return {name: [start.elapsed_time(stop) * 1e-3 for start, stop in pairs] for name, pairs in marks.items()}


def _cpu_seconds(ready: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ready}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(1 + rounds):  # the first one is a warm-up
            for name, run in ready.items():
                start = time.perf_counter()
                run()
                if turn:
                    found[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return found


def cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache that could keep weights from one call to the next."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    names = os.sysconf_names
    found = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in names else 0
    return found if found > 0 else _CPU_CACHE


def copies(size: int, device: torch.device) -> int:
    """How many copies of `size` bytes of weights to cycle through, so that none is still cached when its turn comes."""
    return max(2, min(MOST_COPIES, -(-CACHES_OVER[device.type] * cache_bytes(device) // size)))


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes read and written per second by a large copy on the device: the ceiling for bandwidths."""
    source = torch.randn(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    # not in a graph: copies within one were observed to run slower
    timed = alternate({"copy": [lambda: target.copy_(source)]}, device, rounds, graphs=False)
    return 2 * source.numel() * 4 / timed["copy"].median
