"""How fast this machine is: a short measurement turns work (`cospadi.methods.cost.Work`) into seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cospadi.calibration.statistics import full_precision
from cospadi.methods.cost import Work

LAUNCH = {"cpu": 3e-6, "cuda": 6e-6}
"""Seconds between two small kernels that torch starts one after another; on CUDA fitted to whole runs on an H200."""

START = {"cpu": 0.0, "cuda": 2.0}
"""Seconds until a device does its first useful work in a phase (libraries load, kernels are chosen); fitted too."""

HOST_LINK = 5e9
"""Bytes a second between pageable host memory and a GPU; assumed."""

MEASURING = 0.06
"""Seconds spent on each of at most three measurements."""

TOGETHER = 0.7
"""What is left of a thread's rate while all threads work (measured on two)."""

MEMORY_THREADS = 4
"""Threads that together draw all that memory gives; assumed."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine is.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        products: float32 operations a second in a matrix product.
        forward: the same in the model's float type.
        bandwidth: bytes a second.
    """

    kind: str
    products: float
    forward: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """How long some work takes."""
        transfer = work.transferred / HOST_LINK if self.kind == "cuda" else 0.0
        kernels = work.kernels + (work.cpu_kernels if self.kind == "cpu" else 0.0)
        return (
            work.products / self.products
            + work.forward / self.forward
            + work.moved / self.bandwidth
            + kernels * LAUNCH[self.kind]
            + transfer
        )


def gain(threads: int) -> float:
    """How many times faster some threads are than one by itself."""
    return 1.0 if threads == 1 else TOGETHER * threads


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measure a machine for less than 0.3 s (beside the start of CUDA): products and a pass over memory.

    A processor is measured by one thread's own time, so that other work on it at this moment does not count: the guess
    is for the machine with nothing else to do.

    Args:
        device: where a run would work.
        dtype: the model's float type there; on a processor products are measured in float32 alone.
    """
    if device.type == "cuda":
        with full_precision():
            products = _product_rate(4096, device, torch.float32)
        forward = _product_rate(4096, device, dtype)
        return Speed("cuda", products, forward, _bandwidth(device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = gain(threads) * _product_rate(512, device, torch.float32)
        bandwidth = gain(min(threads, MEMORY_THREADS)) * _bandwidth(device)
    finally:
        torch.set_num_threads(threads)
    return Speed("cpu", products, products, bandwidth)


def _product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    left = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best(lambda: left @ left, device)


def _bandwidth(device: torch.device) -> float:
    matrix, vector = torch.ones(4096, 2048, device=device), torch.ones(2048, device=device)  # 32 MiB
    return matrix.numel() * matrix.element_size() / _best(lambda: torch.mv(matrix, vector), device)


def _best(what: Callable[[], object], device: torch.device) -> float:
    """The least seconds of a few calls."""
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    what()  # libraries are loaded at the first call
    least, begun = float("inf"), time.perf_counter()
    while least == float("inf") or time.perf_counter() - begun < MEASURING:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        at = clock()
        what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, clock() - at)
    return max(least, 1e-9)
