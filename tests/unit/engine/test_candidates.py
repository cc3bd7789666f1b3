"""Candidates: what is solved, what is told from it, and what is handed to the knapsack."""

import itertools
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from cospadi.calibration import Statistics
from cospadi.engine.allocate import trials
from cospadi.engine.allocate.candidates import Curve, Task, Trial, anchors, error_curve, loss_curve, solve_trial
from cospadi.engine.allocate.loss_model import REACH_DOWN, Option, combined, piece_spec, shares, telling
from cospadi.methods import GroupShape, Problem, get_method
from cospadi.methods.representation import Representation

CPU = torch.device("cpu")


class TestCurve:
    def test_a_power_law_is_met_between_and_beyond_its_points(self):
        curve = Curve([(x, 3.0 * x**-1.5) for x in (2.0, 50.0, 700.0)], falling=True, powers=True)
        for x in (0.1, 2.0, 11.0, 699.0, 9e4):
            assert curve(x) == pytest.approx(3.0 * x**-1.5, rel=1e-9)

    def test_noise_never_makes_more_bytes_look_worse(self):
        curve = Curve([(1.0, 9.0), (2.0, 4.0), (3.0, 5.0), (4.0, 1.0)], falling=True)
        values = [curve(1 + i / 10) for i in range(40)]
        assert all(b <= a * (1 + 1e-12) for a, b in pairwise(values))
        assert curve(1.0) == pytest.approx(9.0)

    def test_loss_is_proportional_to_small_errors_and_at_most_quadratic_in_large_ones(self):
        curve = loss_curve([(1.0, 1.0), (10.0, 1000.0)])
        assert curve(0.1) == pytest.approx(0.1)
        assert curve(100.0) == pytest.approx(1e5)
        assert loss_curve([(2.0, 6.0)])(20.0) == pytest.approx(60.0)

    def test_nothing_lost_is_next_to_nothing(self):
        assert 0 <= Curve([(1.0, 1.0), (2.0, 0.0)], falling=True)(2.0) < 1e-20

    def test_errors_that_fall_by_a_factor_with_every_byte_are_met_everywhere(self):
        law = lambda size: 7.0 * 2 ** (-size / 90)  # noqa: E731
        curve = error_curve([(300, law(300)), (520, law(520))], 1000)
        for size in (10, 300, 411, 520, 990):
            assert curve(size) == pytest.approx(law(size), rel=1e-9)

    def test_an_error_known_at_one_size_falls_with_bytes(self):
        curve = error_curve([(300, 5.0)], 1000)
        assert curve(300) == pytest.approx(5.0)
        assert curve(299) / curve(300) == pytest.approx(2 ** (8 / 1000))


def test_anchors_hold_the_target_one_size_below_and_then_the_ends():
    specs = Representation("svd", {}).specs(GroupShape(("m",), 300, (280,)), [i / 50 for i in range(2, 50)])
    target = specs[30].bytes
    low = min(specs, key=lambda spec: abs(spec.bytes - 0.55 * target))
    assert anchors(specs, target, 2) == [low, specs[30]]
    assert anchors(specs, target, 3) == [low, specs[30], specs[-1]]
    assert anchors(specs, target, 4) == [specs[0], low, specs[30], specs[-1]]
    assert anchors(specs[:3], target, 4) == specs[:3]


@pytest.mark.parametrize("down", [1.4, 3.0])
@pytest.mark.parametrize("keep", [0.8, 0.27, 0.14])
def test_shares_lie_about_the_budget(keep, down):
    grid = shares(keep, down)
    assert keep in grid
    assert grid == sorted(set(grid))
    assert grid[0] == pytest.approx(keep / down)
    assert 0.9 * min(2.5 * keep, 1) < grid[-1] < 1


def test_loss_is_extrapolated_to_single_sizes_only():
    shape = GroupShape(("a",), 64, (64,))
    integers = Representation("gptq", {"bits": 2, "group": 64}, fixed=True)
    (two,) = integers.specs(shape, [0.1, 0.9])  # whatever the shares, the one size there is, if it is not too far
    kept = two.bytes / shape.dense_bytes
    assert integers.specs(shape, [1.9 * kept, 0.9]) == [two]
    assert integers.specs(shape, [2.1 * kept, 0.9]) == []


class TestCombined:
    def options(self, seed, count):
        generator = torch.Generator().manual_seed(seed)
        family = Representation("gptq", {}, fixed=True, each=True)
        found = []
        for bits in torch.randint(1, 15, (count,), generator=generator).tolist():
            shape = GroupShape((f"m{seed}",), 32, (bits,))
            spec = get_method("gptq").spec(shape, shape.dense_bytes, {"bits": 8})
            found.append(Option(((family, spec),), float(torch.rand((), generator=generator)) / bits))
        return found

    def test_every_combination_that_none_beats_and_no_other(self):
        singles = [self.options(seed, 5) for seed in (1, 2, 3)]
        sums = [(sum(o.bytes for o in choice), sum(o.loss for o in choice)) for choice in itertools.product(*singles)]
        best = [
            (size, loss)
            for size, loss in sums
            if not any((s <= size and e < loss) or (s < size and e <= loss) for s, e in sums)
        ]
        found = combined(singles)
        assert [option.bytes for option in found] == sorted({size for size, _ in best})
        assert [option.loss for option in found] == pytest.approx([loss for _, loss in sorted(best)])
        assert all(len(option.parts) == 3 for option in found)

    def test_many_are_thinned_out_between_the_smallest_and_the_largest(self):
        singles = [self.options(seed, 30) for seed in range(5)]
        every, few = combined(singles, 10**6), combined(singles, 9)
        assert len(every) > 9 >= len(few)
        assert few[0].bytes == every[0].bytes


def test_pieces_of_a_group_without_a_dictionary_are_stored_as_by_themselves():
    shape = GroupShape(("q", "k"), 70, (33, 21))
    for bits, group in ((2, 32), (3, 64), (8, 128)):
        whole = get_method("gptq").spec(shape, shape.dense_bytes, {"bits": bits, "group": group})
        pieces = [piece_spec(whole, index) for index in (0, 1)]
        for name, size, piece in zip(("q", "k"), (33, 21), pieces, strict=True):
            alone = GroupShape((name,), 70, (size,))
            expected = get_method("gptq").spec(alone, alone.dense_bytes, {"bits": bits, "group": group})
            assert (piece.modules, piece.codes, piece.dictionary) == (expected.modules, expected.codes, None)
        assert sum(piece.bytes for piece in pieces) == whole.bytes


def test_a_trial_gives_the_errors_of_each_piece():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(90, 40, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 40)
    weights = [torch.randn(40, d, generator=generator) for d in (24, 16)]
    statistics = Statistics(x.T @ x, x.abs().sum(0), 90)
    problem = Problem("a+b", tuple(weights), (statistics.mean_gram,), (statistics.mean_abs,), seed=3)
    task = Task.of(problem, [24, 16])
    family = Representation("gptq", {"bits": 3, "group": 16}, fixed=True, each=True)
    (spec,) = family.specs(GroupShape(("a", "b"), 40, (24, 16)), [0.01, 0.99])
    trial, found = solve_trial(task, family, spec)
    for piece, (weight, got) in enumerate(zip(weights, torch.split(found, [24, 16], 1), strict=True)):
        outputs = x @ (weight.double() - got.double())
        assert trial.missed[piece] == pytest.approx(float(outputs.square().sum()) / 90, rel=1e-9)
    both = torch.cat(weights, 1)
    assert trial.relative == pytest.approx(float((both - found).norm() / both.norm()), rel=1e-5)
    assert trial.total == pytest.approx(sum(trial.missed))
    # layers that share nothing are solved together exactly as each by itself
    single = Task.of(replace(problem, weights=tuple(weights[1:])), [16])
    alone, _ = solve_trial(single, family, piece_spec(spec, 1))
    assert alone.missed[0] == pytest.approx(trial.missed[1], rel=1e-6)


def trial_of(size, missed, pieces=1):
    shape = GroupShape(("m",), 32, (size,))
    return Trial(get_method("rtn").spec(shape, shape.dense_bytes, {"bits": 8}), (missed / pieces,) * pieces, 0.1)


class TestTelling:
    def task(self):
        weight = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return SimpleNamespace(weight=weight, widths=(4, 2))

    def test_those_nearest_to_the_target_and_well_below_it_for_every_piece(self):
        task = self.task()
        solved = [
            (trial_of(size, missed, 2), torch.full((32, 6), float(size)))
            for size, missed in ((10, 9.0), (20, 5.0), (30, 6.0), (40, 1.0), (80, 0.5))
        ]
        found = telling(solved, task, solved[3][0].spec.bytes)
        assert [(piece, missed) for piece, missed, _ in found] == [(0, 0.5), (1, 0.5), (0, 2.5), (1, 2.5)]
        assert [part.shape[1] for _, _, part in found] == [4, 2, 4, 2]
        assert float(found[2][2].mean()) == 20.0

    def test_a_single_error_is_taken_twice_as_large_once_more(self):
        task = self.task()
        weight = task.weight.float() + 0.01
        found = telling([(trial_of(10, 3.0, 2), weight)], task, 100)
        assert [(piece, missed) for piece, missed, _ in found] == [(0, 1.5), (0, 6.0), (1, 1.5), (1, 6.0)]
        assert torch.allclose(found[3][2] - task.weight.float()[:, 4:], torch.full((32, 2), 0.02), atol=1e-6)


class TestTrier:
    """Which families stay, on made-up errors."""

    def trier(self, monkeypatch, factors, **family):
        solved = []

        def fake(task, family, spec):
            solved.append((family.method, spec.bytes))
            return Trial(spec, (factors[family.method] * 2.0 ** (-spec.bytes / 2000),), 0.1), torch.zeros(1)

        monkeypatch.setattr(trials, "solve_trial", fake)
        families = [Representation(name, {}, costly=True, **family) for name in factors]
        return trials.Trier(families, shares(0.5, REACH_DOWN), 0.5), solved

    def solve(self, trier, times):
        shape = GroupShape(("model.layers.0.self_attn.o_proj",), 64, (96,))
        return [sorted(trier.offered[i].method for i in trier.trials(shape, None)[1]) for _ in range(times)]

    def test_one_that_is_far_behind_goes_after_a_single_trial(self, monkeypatch):
        trier, solved = self.trier(monkeypatch, {"svd": 1.0, "asvd": 2.0})
        assert self.solve(trier, 3) == [["asvd", "svd"], ["svd"], ["svd"]]
        assert sum(name == "asvd" for name, _ in solved) == 1

    def test_one_that_is_a_little_behind_everywhere_goes_after_two_groups(self, monkeypatch):
        trier, _ = self.trier(monkeypatch, {"svd": 1.0, "asvd": 1.05})
        assert self.solve(trier, 3) == [["asvd", "svd"], ["asvd", "svd"], ["svd"]]

    def test_the_first_of_the_list_has_no_privilege(self, monkeypatch):
        trier, _ = self.trier(monkeypatch, {"svd": 1.05, "asvd": 1.0})
        assert self.solve(trier, 3)[-1] == ["asvd"]

    def test_equals_stay(self, monkeypatch):
        trier, _ = self.trier(monkeypatch, {"svd": 1.0, "asvd": 1.0})
        assert self.solve(trier, 4)[-1] == ["asvd", "svd"]

    def test_what_ends_far_below_the_budget_is_not_tried(self, monkeypatch):
        trier, solved = self.trier(monkeypatch, {"svd": 1.0}, most=0.3)
        assert trier.active == []
        self.solve(trier, 1)  # the smallest there is
        assert len(solved) == 1
