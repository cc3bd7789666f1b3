"""The trellis encoder and the solver on CUDA against the CPU. Needs a CUDA device."""

import pytest
import torch

from cospadi.solvers import triton_trellis
from cospadi.solvers.trellis import _search, decode, encode, margin, spread
from cospadi.solvers.trellis_rows import Problem, TrellisCode, trellis_many
from cospadi.solvers.triton_trellis import encode_tiles, runs_on
from gram import correlated, loss, rand

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def cost(targets, symbols, bits, state, weights=1.0):
    return ((decode(symbols, bits, state) - targets).double().square() * weights).sum(-1)


def test_the_kernel_runs():
    assert runs_on(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("bits", "state"), [(b, s) for b in (1, 2, 3, 4) for s in (8, 9, 10, 11, 12, 14, 16)])
def test_paths_are_those_of_the_cpu(bits, state, size, weighted):
    count = 3 if state > 12 else 20
    targets = spread(16) * rand(count, size, seed=bits + state)
    roots = (0.5 * rand(count, size, seed=1)).exp() if weighted else None
    around = margin(bits, state, size)
    right = _search(targets, roots, bits, state, around)
    made = encode_tiles(targets.cuda(), None if roots is None else roots.cuda(), bits, state, around).cpu()
    weights = 1.0 if roots is None else roots.double().square()
    expected = cost(targets, right, bits, state, weights)
    # rounding may decide between two paths of nearly the same cost, and for another state at the seam
    torch.testing.assert_close(cost(targets, made, bits, state, weights), expected, rtol=1e-2, atol=0)
    same = (made == right).all(1).float().mean()
    assert same >= 0.6


@pytest.mark.parametrize("state", [12, 16])
@pytest.mark.parametrize("dp4a", [True, False])
def test_more_tiles_than_programs(dp4a, state, monkeypatch):
    monkeypatch.setattr(triton_trellis, "DP4A", dp4a)
    targets = spread(state) * rand(1500 if state == 12 else 700, 256, seed=2).cuda()
    made = encode(targets, 2, state)
    assert torch.equal(made, encode(targets, 2, state))
    for part in (slice(0, 3), slice(-3, None)):
        assert torch.equal(made[part], encode(targets[part], 2, state))
    missed = cost(targets, made, 2, state).sum() / targets.double().square().sum()
    assert missed < (0.0745 if state == 12 else 0.072)


def test_symbols_that_are_a_stream_are_found_again():
    for bits in (1, 2, 3, 4):
        symbols = torch.randint(2**bits, (50, 256), device="cuda")
        targets = decode(symbols, bits, 16)
        assert torch.equal(decode(encode(targets, bits, 16), bits, 16), targets)


@pytest.mark.parametrize(
    ("shape", "code"), [((130, 97), TrellisCode(2, 10, 4, 64)), ((64, 160), TrellisCode(4, 12, 8, 32))]
)
def test_matrices_are_as_good_as_on_the_cpu(shape, code):
    rows, hessian = rand(*shape, seed=3), correlated(shape[1], seed=4)
    made, again = (trellis_many([Problem(rows.cuda(), hessian.cuda())], code, rounds=2, sweeps=1)[0] for _ in range(2))
    assert torch.equal(made.symbols, again.symbols) and torch.equal(made.scales, again.scales)
    right = trellis_many([Problem(rows, hessian)], code, rounds=2, sweeps=1)[0]
    assert loss(hessian, rows, made.matrix.cpu()) == pytest.approx(loss(hessian, rows, right.matrix), rel=0.05)
