"""The fast solver: constraints hold exactly, dead atoms revive, and it beats the faithful solver at the same size."""

import pytest
import torch

from cospadi.format.patterns import balanced_nonzeros, keep_largest, parse_pattern
from cospadi.solvers.ksvd import ksvd
from cospadi.solvers.pursuit import (
    gradient_steps,
    initial_dictionary,
    lipschitz_bound,
    order_by_use,
    pursuit,
    tightening,
)


def decaying(d: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=dtype) ** -0.7
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=dtype)).Q
    return mixing @ (scale[:, None] * torch.randn(d, n, generator=generator, dtype=dtype))


def relative_error(target: torch.Tensor, dictionary: torch.Tensor, codes: torch.Tensor) -> float:
    return float((target - dictionary @ codes).square().sum() / target.square().sum())


@pytest.mark.parametrize(
    ("d", "n", "atoms", "nonzeros", "pattern"),
    [
        (24, 50, 17, 5, "free"),
        (24, 50, 40, 9, "free"),
        (30, 41, 37, 0, "8:32"),
        (30, 41, 64, 0, "2:4"),
        (9, 3, 5, 5, "free"),
    ],
)
def test_support_is_exact(d, n, atoms, nonzeros, pattern):
    target = decaying(d, n, seed=d + n)
    found = pursuit(target, atoms, nonzeros, pattern=pattern, rounds=6)
    expected = nonzeros if pattern == "free" else balanced_nonzeros(atoms, *parse_pattern(pattern))
    assert found.support.shape == found.codes.shape == (atoms, n)
    assert (found.support.sum(0) == expected).all()
    assert (found.codes[~found.support] == 0).all()
    if pattern != "free":
        kept, run = parse_pattern(pattern)
        whole = atoms // run * run
        assert (found.support[:whole].view(-1, run, n).sum(1) == kept).all()
    torch.testing.assert_close(found.dictionary.norm(dim=0), torch.ones(atoms, dtype=target.dtype))
    assert found.losses[-1] == pytest.approx(relative_error(target, found.dictionary, found.codes), rel=1e-9)


def test_losses_fall_and_beat_ksvd_at_the_same_size():
    target = decaying(32, 96, seed=3)
    found = pursuit(target, 24, 12, rounds=20)
    _, _, faithful = ksvd(target, 24, 12, rounds=20, seed=0)
    tight = next(number for number in range(20) if tightening(number, 20, 24, 12, "free")[1] == 12)
    assert 10 <= tight <= 14  # from here on the number of non-zeros is the final one
    assert found.losses[-1] < found.losses[tight] and len(found.losses) == 21
    assert found.losses[-1] < faithful[-1] / float(target.square().sum())


@pytest.mark.parametrize(
    ("atoms", "nonzeros", "pattern"), [(40, 7, "free"), (70, 0, "16:32"), (33, 0, "2:4"), (9, 9, "free")]
)
@pytest.mark.parametrize("rounds", [1, 2, 7, 50])
def test_tightening_never_loosens_and_ends_at_the_pattern(atoms, nonzeros, pattern, rounds):
    steps = [tightening(number, rounds, atoms, nonzeros, pattern) for number in range(rounds)]
    final = nonzeros if pattern == "free" else balanced_nonzeros(atoms, *parse_pattern(pattern))
    counts = [count for _, count in steps]
    assert counts == sorted(counts, reverse=True) and max(counts) <= min(atoms, round(1.26 * final) + 3)
    assert steps[-1] == (pattern, final)
    assert rounds < 7 or counts[0] > final or pattern == "2:4" or final == atoms


def test_full_support_equals_truncated_svd():
    target = decaying(20, 35, seed=1)
    found = pursuit(target, 8, 8, rounds=3)
    spectrum = torch.linalg.svdvals(target)
    assert found.losses[-1] == pytest.approx(float((spectrum[8:] ** 2).sum() / (spectrum**2).sum()), rel=1e-4)


def test_float32_agrees_with_float64():
    target = decaying(24, 60, seed=5)
    double = pursuit(target, 20, 8, rounds=10).losses[-1]
    single = pursuit(target.float(), 20, 8, rounds=10).losses[-1]
    assert single == pytest.approx(double, rel=0.05)


def test_same_seed_same_bytes():
    target = decaying(16, 40, seed=2, dtype=torch.float32)
    first, second = (pursuit(target, 24, 6, seed=9) for _ in range(2))
    assert torch.equal(first.dictionary, second.dictionary) and torch.equal(first.codes, second.codes)
    other = pursuit(target, 24, 6, seed=10)
    assert not torch.equal(first.dictionary, other.dictionary)


def test_more_atoms_than_distinct_columns_and_rank_deficiency():
    column = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pursuit(column.expand(12, 7).contiguous(), 15, 3, rounds=5)
    assert found.dictionary.isfinite().all() and found.codes.isfinite().all()
    assert found.losses[-1] < 1e-10


def test_zero_target_gives_finite_factors():
    found = pursuit(torch.zeros(6, 9), 8, 2, rounds=4)
    assert found.dictionary.isfinite().all() and (found.dictionary @ found.codes).abs().max() == 0


def test_initial_dictionary_is_orthonormal_up_to_d_and_unit_norm_beyond():
    target = decaying(10, 30, seed=4)
    dictionary = initial_dictionary(target, 14, torch.Generator().manual_seed(0))
    eye = torch.eye(10, dtype=target.dtype)
    torch.testing.assert_close(dictionary[:, :10].T @ dictionary[:, :10], eye)
    torch.testing.assert_close(dictionary.norm(dim=0), torch.ones(14, dtype=target.dtype))


def test_gradient_steps_lower_the_error():
    target = decaying(16, 20, seed=8)
    dictionary = initial_dictionary(target, 16, torch.Generator().manual_seed(0))[:, torch.randperm(16)]
    dictionary = dictionary + 0.1 * torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gram, right = dictionary.T @ dictionary, target.T @ dictionary
    start = right * keep_largest(right, 6, dim=1)
    lipschitz, _ = lipschitz_bound(gram, iterations=30)
    assert lipschitz >= float(torch.linalg.eigvalsh(gram)[-1])
    moved = gradient_steps(start, gram, right, lipschitz, 8, 6, "free")
    assert relative_error(target, dictionary, moved.T) < relative_error(target, dictionary, start.T)


@pytest.mark.parametrize(("k", "m"), [(64, 32), (70, 32), (12, 4), (3, 8)])
def test_order_by_use_is_a_permutation_that_evens_out_use(k, m):
    generator = torch.Generator().manual_seed(k)
    codes = (torch.rand(200, k, generator=generator) < torch.linspace(0.05, 0.9, k)).float()
    order = order_by_use(codes, m)
    assert torch.equal(order.sort().values, torch.arange(k))
    runs = k // m
    if runs > 1:
        use = codes[:, order].sum(0)[: runs * m].view(runs, m).sum(1)
        plain = codes.sum(0)[: runs * m].view(runs, m).sum(1)
        assert use.max() - use.min() < 0.2 * (plain.max() - plain.min())
