"""Patterns: parsing, how many entries they admit, and the largest of them."""

import pytest
import torch

from cospadi.format.patterns import GROUP_SIZES, balanced_nonzeros, keep_largest, parse_pattern


def test_patterns_are_parsed_or_refused():
    assert parse_pattern("free") is None
    assert parse_pattern("2:4") == (2, 4)
    for wrong in ("", "dense", "2:5", "0:4", "5:4", "-1:4", "2:4 ", "2/4"):
        with pytest.raises(ValueError, match="pattern"):
            parse_pattern(wrong)


@pytest.mark.parametrize("m", GROUP_SIZES)
@pytest.mark.parametrize("k", [1, 3, 32, 45, 64])
def test_every_run_holds_its_share(k, m):
    values = torch.randn(k, 7, generator=torch.Generator().manual_seed(k))
    n = max(1, m // 3)
    mask = keep_largest(values, 0, f"{n}:{m}")
    assert (mask.sum(0) == balanced_nonzeros(k, n, m)).all()
    for start in range(0, k, m):
        part, kept = values[start : start + m].abs(), mask[start : start + m]
        count = -(-n * len(part) // m)
        assert (kept.sum(0) == count).all()
        least_kept = torch.where(kept, part, torch.inf).amin(0)
        largest_left = torch.where(kept, -torch.inf, part).amax(0)
        assert (least_kept >= largest_left).all()


@pytest.mark.parametrize(("nonzeros", "pattern"), [(1, "free"), (5, "free"), (45, "free"), (99, "free"), (0, "3:8")])
def test_both_orientations_agree(nonzeros, pattern):
    values = torch.randn(45, 6, generator=torch.Generator().manual_seed(0))
    rows = values.T.contiguous()
    columns = keep_largest(values, nonzeros, pattern)
    assert torch.equal(keep_largest(rows, nonzeros, pattern, dim=1), columns.T)
    assert torch.equal(keep_largest(rows.T, nonzeros, pattern), columns)
    if pattern == "free":
        assert (columns.sum(0) == min(nonzeros, 45)).all()


def test_counts_are_exact_where_all_are_equal():
    assert (keep_largest(torch.zeros(9, 4), 3).sum(0) == 3).all()
    assert (keep_largest(torch.zeros(4, 12), 0, "2:4", dim=1).sum(1) == 6).all()
