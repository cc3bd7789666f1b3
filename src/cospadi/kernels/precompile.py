"""Compile the kernels of many layers ahead of time, in parallel processes.

Triton compiles a kernel at its first launch, one after the other, each in seconds. The kernels compiled here end up in
Triton's cache on disk, where this process finds them.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import replace

import torch

from cospadi.format import MatrixSpec

logger = logging.getLogger(__name__)

MOST_JOBS = 14
ROWS = 64  # of the matrices that stand in for the real ones: no kernel depends on the number of rows
Product = tuple[MatrixSpec, int, MatrixSpec | None]
"""A stored matrix, the rows of x, and the codes that read the result, if any."""
Task = tuple[MatrixSpec, int, torch.dtype, bool, int]
"""A stored matrix, rows of x (0: only unpack), dtype of the outputs, whether they are spaced, index of the option."""


def compile_ahead(products: Iterable[Product], dtype: torch.dtype, *, jobs: int = 0, patience: float = 120.0) -> None:
    """Compile every kernel that may be chosen for some products on the current CUDA device.

    Errors are only logged; the first real launch reports them.

    Args:
        products: the products to compile for.
        dtype: of the layers.
        jobs: number of processes; 0 for one per core, at most MOST_JOBS.
        patience: seconds to wait for a single kernel.
    """
    from cospadi.kernels.triton import launch

    tasks: dict[Task, None] = {}
    for spec, tokens, reader in products:
        if not launch.readable(spec):
            continue
        small = replace(spec, rows=ROWS)
        made, more = launch.handed_on(spec, tokens, reader, dtype)
        options = len(launch.options(small, tokens)) if tokens <= launch.MOST_TOKENS else 0
        tasks |= {(small, tokens, made, bool(more), index): None for index in range(options)}
        if spec.sparse or spec.bits != 16:
            tasks[small, 0, dtype, False, 0] = None
    jobs = min(jobs or min(os.cpu_count() or 1, MOST_JOBS), len(tasks))
    if jobs < 2:
        return
    device = torch.cuda.current_device()
    try:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            done = pool.imap_unordered(_compile, [(task, dtype, device) for task in tasks])
            for _ in tasks:
                done.next(patience)
    except (multiprocessing.TimeoutError, OSError, RuntimeError) as error:
        logger.warning("kernels could not be compiled ahead of time (%s): each will be at its first launch", error)


def _compile(task: tuple[Task, torch.dtype, int]) -> None:
    """Launch one kernel once."""
    from cospadi.kernels.synthetic import random_packed
    from cospadi.kernels.triton import launch

    (spec, tokens, made, spaced, index), dtype, device = task
    try:
        with torch.cuda.device(device):
            packed = random_packed(spec, dtype, "cuda")
            if not tokens:
                launch.unpacked(packed, spec, dtype)
                return
            kernel, config = launch.options(spec, tokens)[index]
            x = torch.zeros(tokens, spec.columns, dtype=dtype, device="cuda")
            kernel(x, packed, spec, config, made, **({"spaced": True} if spaced else {}))
            if tokens == 1 and kernel is launch.sparse:  # x may come in float32 from another product
                kernel(x.float(), packed, spec, config, made)
    except Exception as error:
        logger.debug("%s: %s", task, error)
