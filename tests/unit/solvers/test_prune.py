import pytest
import torch

from cospadi.format.patterns import balanced_nonzeros, keep_largest
from cospadi.solvers.feedback import damped
from cospadi.solvers.prune import sparsegpt, wanda_support

PATTERNS = ["2:4", "4:8", "16:32", "3:16"]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def correlated(size, seed=0, tokens=300):
    inputs = rand(tokens, size, seed=seed) @ (rand(size, size, seed=seed + 1) * torch.linspace(0.1, 2, size))
    return inputs.T @ inputs / tokens


def loss(hessian, rows, values):
    miss = rows - values
    return float(((miss @ hessian) * miss).sum())


def runs(size, m):
    return [range(start, min(start + m, size)) for start in range(0, size, m)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [32, 45])
def test_every_run_keeps_what_the_pattern_says(pattern, size):
    n, m = map(int, pattern.split(":"))
    rows, gram = rand(6, size, seed=1), correlated(size, seed=2)
    pruned, kept = sparsegpt(rows, gram, pattern, sweeps=1)
    for mask in (kept, wanda_support(rows, gram, pattern)):
        for run in runs(size, m):
            assert bool((mask[:, list(run)].sum(1) == -(-n * len(run) // m)).all())
        assert bool((mask.sum(1) == balanced_nonzeros(size, n, m)).all())
    assert not pruned[~kept].any()


def test_wanda_compares_weight_times_input_norm():
    rows, gram = rand(5, 16, seed=3), correlated(16, seed=4)
    kept = wanda_support(rows, gram, "1:4")
    for r in range(5):
        for run in runs(16, 4):
            score = [abs(float(rows[r, c])) * float(gram[c, c]) ** 0.5 for c in run]
            assert kept[r, run[score.index(max(score))]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_beats_wanda_beats_magnitude(pattern):
    rows, gram = rand(30, 64, seed=5), correlated(64, seed=6)
    errors = [
        loss(gram, rows, values)
        for values in (
            sparsegpt(rows, gram, pattern, sweeps=2)[0],
            sparsegpt(rows, gram, pattern)[0],
            rows * wanda_support(rows, gram, pattern),
            rows * keep_largest(rows, 0, pattern, dim=1),
        )
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.8 * errors[2]


def test_left_to_right_it_is_the_published_algorithm():
    rows, gram = rand(4, 12, seed=7), correlated(12, seed=8)
    made, kept = sparsegpt(rows, gram, "2:4", reorder=False)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    left = rows.clone()
    for r in range(4):
        for c in range(12):
            if c % 4 == 0:
                score = left[r, c : c + 4].square() / factor.diagonal()[c : c + 4].square()
                keep = score >= score.sort().values[2]
            assert bool(keep[c % 4]) == bool(kept[r, c])
            value = left[r, c] * keep[c % 4]
            left[r, c:] -= (left[r, c] - value) / factor[c, c] * factor[c, c:]
            left[r, c] = value
    torch.testing.assert_close(made, left)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_rank_deficient_grams(tokens):
    rows, inputs = rand(3, 20, seed=9), rand(tokens, 20, seed=10)
    pruned, kept = sparsegpt(rows, inputs.T @ inputs, "4:8", sweeps=2)
    assert bool(pruned.isfinite().all()) and int(kept.sum()) == 3 * 10
    if tokens == 0:
        assert torch.equal(kept, keep_largest(rows, 0, "4:8", dim=1))
        torch.testing.assert_close(pruned, rows * kept)


def test_a_free_pattern_is_refused():
    for prune in (sparsegpt, wanda_support):
        with pytest.raises(ValueError, match="n:m"):
            prune(rand(2, 8), correlated(8), "free")
