"""The kernel that searches trellis codes, on CPU, in Triton's interpreter.

Run by test_interpreted.py in a process of its own, with TRITON_INTERPRET=1 from the start.
"""

import os

import pytest
import torch

from cospadi.solvers import triton_trellis as module
from cospadi.solvers.trellis import _search, decode
from cospadi.solvers.triton_trellis import encode_tiles, runs_on
from gram import rand

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"


def cost(targets, symbols, bits, state, weights):
    return ((decode(symbols, bits, state) - targets).double().square() * weights).sum(-1)


@pytest.mark.parametrize(
    ("bits", "state", "per_thread", "tiles", "weighted"),
    [(1, 8, 4, 2, False), (2, 8, 1, 2, True), (3, 9, 4, 1, True), (4, 8, 4, 1, False)],
    ids=str,
)
def test_the_kernel_finds_what_the_cpu_finds(bits, state, per_thread, tiles, weighted, monkeypatch):
    monkeypatch.setattr(module, "PER_THREAD", per_thread)
    monkeypatch.setattr(module, "FEW_WARPS", 1)
    monkeypatch.setattr(module, "WARPS", 1)
    size, around = 16, 4  # few steps: the interpreter takes long
    targets, roots = 150 * rand(tiles, size, seed=bits), rand(tiles, size, seed=1).exp() if weighted else None
    made = encode_tiles(targets, roots, bits, state, around)
    right = _search(targets, roots, bits, state, around)
    weights = 1.0 if roots is None else roots.double().square()
    assert made.dtype == torch.uint8 and int(made.max()) < 2**bits
    # rounding may decide between two paths of nearly the same cost
    torch.testing.assert_close(
        cost(targets, made, bits, state, weights), cost(targets, right, bits, state, weights), rtol=1e-5, atol=0
    )
    assert bool((made == right).all(1).any())


def test_no_tiles():
    assert encode_tiles(torch.zeros(0, 64), None, 2, 8, 32).shape == (0, 64)


def test_the_trial_run_says_when_it_fails(monkeypatch, caplog):
    runs_on.cache_clear()
    monkeypatch.setattr(module, "encode_tiles", lambda *_: 1 / 0)
    assert not runs_on(torch.device("cpu")) and "trellis codes" in caplog.text
    runs_on.cache_clear()
