"""Distances over windows and pairs of least total distance, against exhaustive search."""

import pytest
import torch

from cospadi.solvers.matching import best_pairs, pair_distances, window_distance


def table(count, seed, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, count, generator=generator, dtype=torch.float64)
    values[torch.rand(count, count, generator=generator) < missing] = torch.inf
    values = torch.triu(values, 1)
    values = values + values.T
    return values.fill_diagonal_(torch.inf)


def exhaustive(distances):
    """Most pairs first, then least total: over all matchings."""
    count = len(distances)

    def search(free):
        if not free:
            return 0, 0.0
        first, rest = free[0], free[1:]
        best = search(rest)
        for other in rest:
            if distances[first, other] < torch.inf:
                pairs, total = search([i for i in rest if i != other])
                candidate = (pairs + 1, total + float(distances[first, other]))
                if (-candidate[0], candidate[1]) < (-best[0], best[1]):
                    best = candidate
        return best

    return search(list(range(count)))


@pytest.mark.parametrize("count", [2, 5, 6, 7, 8])
@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_equals_exhaustive_search(count, missing):
    for seed in range(4):
        distances = table(count, seed=100 * count + seed, missing=missing)
        pairs = best_pairs(distances)
        assert len({i for pair in pairs for i in pair}) == 2 * len(pairs)
        assert all(i < j for i, j in pairs)
        expected_pairs, expected_total = exhaustive(distances)
        assert len(pairs) == expected_pairs
        assert sum(float(distances[p]) for p in pairs) == pytest.approx(expected_total)


def test_nothing_to_pair():
    assert best_pairs(torch.full((3, 3), torch.inf)) == []
    assert best_pairs(torch.full((1, 1), torch.inf)) == []


def test_equal_distances():
    assert len(best_pairs(torch.ones(6, 6))) == 3


@pytest.mark.parametrize(("m", "n"), [(5, 5), (4, 11), (1, 7)])
def test_window_distance_is_the_minimum_over_windows(m, n):
    generator = torch.Generator().manual_seed(m + n)
    narrow = torch.randn(8, m, generator=generator, dtype=torch.float64)
    wide = torch.randn(8, n, generator=generator, dtype=torch.float64)
    expected = min(float((wide[:, w : w + m] - narrow).norm() / narrow.norm()) for w in range(n - m + 1))
    assert window_distance(narrow, wide) == pytest.approx(expected)


def test_a_copy_inside_is_at_distance_zero():
    wide = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert window_distance(wide[:, 5:9], wide) < 1e-6


def test_distances_find_planted_pairs():
    generator = torch.Generator().manual_seed(1)
    base = [torch.randn(10, 9, generator=generator, dtype=torch.float64) for _ in range(3)]
    noisy = [b[:, :6] + 0.1 * torch.randn(10, 6, generator=generator, dtype=torch.float64) for b in base]
    distances = pair_distances([*base, *noisy])
    assert torch.equal(distances, distances.T) and distances.diagonal().isinf().all()
    assert best_pairs(distances) == [(0, 3), (1, 4), (2, 5)]


def test_impossible_windows():
    a, b = torch.zeros(4, 5), torch.ones(4, 3)
    with pytest.raises(ValueError, match="no window"):
        window_distance(a, b)
    with pytest.raises(ValueError, match="no window"):
        window_distance(torch.ones(3, 2), b)
    assert window_distance(torch.zeros(4, 2), b) == float("inf")
