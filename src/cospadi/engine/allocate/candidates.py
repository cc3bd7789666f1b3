"""Candidates of a group: ways to store it, their bytes, and what error to expect of them.

A *family* is a method with fixed options; asked for a number of bytes, it gives a spec. A few members of each family
are solved quickly, and the errors of the others interpolated between them. Where the layers of a group share nothing,
each of them is a *piece* with errors and choices of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.engine.factorise import rebuild, solve
from cospadi.engine.plan.plan import least_spec
from cospadi.errors import BudgetError
from cospadi.format import GroupSpec
from cospadi.methods import GroupShape, Problem, get_method
from cospadi.runtime.fingerprints import derived_seed

TINY = 1e-30
QUICK = {"rounds": 8, "refits": 1, "clip_search": 4, "search": 8, "sweeps": 0, "rescale": 0}
"""Most of each of these options in a trial. Errors of all sizes suffer alike, so comparisons stand."""
FURTHER = 2.0
"""How many times below the least share a size may lie that is the only one of its family: there is none nearer."""
LOWER = 0.55
"""Where the second of two anchors lies, as a share of the target."""


@dataclass(frozen=True)
class Family:
    """A method with options.

    Attributes:
        method: its name.
        options: of that method.
        least: least share of bytes at which it is tried.
        most: largest such share.
        costly: whether it is solved at few sizes only, and given up where it has shown to be behind.
        fixed: whether the options leave no choice of size.
        learnt: whether its errors, compared to those of other families, are carried over from other groups.
        each: whether nothing is shared between the layers of a group, so that each of them may choose for itself.
    """

    method: str
    options: dict[str, Any]
    least: float = 0.0
    most: float = 1.0
    costly: bool = False
    fixed: bool = False
    learnt: bool = False
    each: bool = False

    def specs(self, shape: GroupShape, shares: Sequence[float]) -> list[GroupSpec]:
        """The distinct specs within the family's range at the given shares of the dense bytes, by rising bytes."""
        method, found = get_method(self.method), {}
        if self.fixed:
            spec = method.spec(shape, shape.dense_bytes, self.options)
            return [spec] if shares[0] / FURTHER <= spec.bytes / shape.dense_bytes <= shares[-1] else []
        for share in shares:
            if not self.least <= share <= self.most:
                continue
            try:
                spec = method.spec(shape, int(share * shape.dense_bytes), self.options)
            except BudgetError:
                continue
            found[spec.bytes] = spec
        return [found[size] for size in sorted(found)]

    @property
    def hurried(self) -> dict[str, Any]:
        """The options of a trial."""
        full = get_method(self.method).check(self.options)
        return self.options | {
            key: min(full[key], most) for key, most in QUICK.items() if isinstance(full.get(key), int)
        }

    def smallest(self, shape: GroupShape) -> GroupSpec:
        """The least spec, whatever the range."""
        return least_spec(shape, get_method(self.method), self.options)


@dataclass(frozen=True)
class Trial:
    """One candidate whose error is known.

    Attributes:
        spec: of it, for the whole group.
        missed: squared output error per token, of each piece of the group.
        relative: ‖W − Ŵ‖ / ‖W‖ in the weights' own space.
    """

    spec: GroupSpec
    missed: tuple[float, ...]
    relative: float

    @property
    def total(self) -> float:
        """Squared output error per token of the whole group."""
        return sum(self.missed)


@dataclass(frozen=True)
class Task:
    """A group to solve trials for, on the device.

    Attributes:
        problem: weights and Gram.
        weight: all weights side by side, (d_in, n) float64.
        widths: columns of each piece of the group.
    """

    problem: Problem
    weight: Tensor
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        name: str,
        weights: Sequence[Tensor],
        statistics: Statistics,
        widths: Sequence[int],
        *,
        seed: int,
        device: torch.device,
        fisher: Sequence[Tensor] = (),
    ) -> Task:
        """Bring a group to the device.

        Args:
            name: of the group.
            weights: W (d_in, d_out) of every module.
            statistics: of their common input.
            widths: columns of each piece.
            seed: of the run.
            device: where to compute.
            fisher: mean squared gradient of every weight, for methods that need it.
        """
        held = tuple(weight.to(device).float() for weight in weights)
        problem = Problem(
            name=name,
            weights=held,
            grams=(statistics.mean_gram.to(device),),
            mean_abs=(statistics.mean_abs.to(device),),
            fisher=tuple(item.to(device) for item in fisher),
            seed=derived_seed(seed, name),
        )
        return cls(problem, torch.cat(held, 1).double(), tuple(widths))


def solve_trial(task: Task, family: Family, spec: GroupSpec, dtype: torch.dtype) -> tuple[Trial, Tensor]:
    """Factorise with few rounds.

    Args:
        task: the group.
        family: method and options.
        spec: what to reach.
        dtype: the model's 16-bit float.

    Returns:
        the trial, and Ŵ (d_in, n) float32 on the CPU, as packed and read back.
    """
    tensors = solve(get_method(family.method), family.hurried, spec, task.problem, dtype)
    found = rebuild(tensors, spec)
    miss = task.weight - found
    columns = (miss * (task.problem.grams[0] @ miss)).sum(0)
    missed = tuple(float(part.sum()) for part in torch.split(columns, list(task.widths)))
    relative = float(miss.norm() / task.weight.norm().clamp_min(TINY))
    return Trial(spec, missed, relative), found.float().cpu()


def anchors(specs: Sequence[GroupSpec], target: int, count: int) -> list[GroupSpec]:
    """Specs to solve: all if they are few, else the one at the target, one well below, then both ends.

    Args:
        specs: distinct, by rising bytes.
        target: bytes near which one anchor shall lie.
        count: 2 to 4.

    Returns:
        that many at most, by rising bytes.
    """
    if len(specs) <= count:
        return list(specs)
    wanted = [target, LOWER * target, specs[-1].bytes, specs[0].bytes][:count]
    chosen = {min(range(len(specs)), key=lambda i: abs(specs[i].bytes - size)) for size in wanted}
    return [specs[i] for i in sorted(chosen)]


class Curve:
    """A positive quantity y over x, the logarithm of y straight between known points.

    Args:
        points: (x, y); y of 0 counts as next to nothing.
        falling: y is made to fall (or not) with x; otherwise to rise.
        slopes: least and largest slope of log y to the left and to the right of the points.
        powers: x is positive and its logarithm is meant wherever x is: y is a power of x between points.
    """

    def __init__(
        self,
        points: Sequence[tuple[float, float]],
        *,
        falling: bool,
        left: tuple[float, float] = (-inf, inf),
        right: tuple[float, float] = (-inf, inf),
        powers: bool = False,
    ) -> None:
        self.powers = powers
        self.x: list[float] = []
        self.y: list[float] = []
        for x, y in sorted((self._place(x), log(max(y, TINY))) for x, y in points):
            if self.x:
                y = min(y, self.y[-1]) if falling else max(y, self.y[-1])
                if x <= self.x[-1]:
                    self.y[-1] = y
                    continue
            self.x.append(x)
            self.y.append(y)
        self.left, self.right = left, right

    def __call__(self, x: float) -> float:
        """Y at x."""
        at = self._place(x)
        if at <= self.x[0]:
            return self._beyond(at, 0, self._slope(0), self.left)
        if at >= self.x[-1]:
            return self._beyond(at, -1, self._slope(len(self.x) - 2), self.right)
        right = bisect_left(self.x, at)
        return exp(self.y[right - 1] + (at - self.x[right - 1]) * self._slope(right - 1))

    def _place(self, x: float) -> float:
        return log(max(x, TINY)) if self.powers else float(x)

    def _slope(self, index: int) -> float:
        if len(self.x) < 2:
            return 0.0
        return (self.y[index + 1] - self.y[index]) / (self.x[index + 1] - self.x[index])

    def _beyond(self, at: float, end: int, slope: float, limits: tuple[float, float]) -> float:
        slope = min(max(slope, limits[0]), limits[1])
        return exp(min(self.y[end] + (at - self.x[end]) * slope, 700.0))


def error_curve(points: Sequence[tuple[int, float]], dense_bytes: int) -> Curve:
    """Errors over bytes: they fall by nearly the same factor with every byte, as rate and distortion do.

    Straight lines between and beyond points are met within about ten per cent from a third of a size to half as much
    again (measured on a trained model, dictionaries and integers alike).

    Args:
        points: bytes and squared errors of solved candidates.
        dense_bytes: of the group.
    """
    # Known at one size only, errors are taken to fall by 2^-8 from nothing to all bytes; never less than to a half.
    least, usual = -log(2) / dense_bytes, -8 * log(2) / dense_bytes
    slopes = (-inf, least) if len(points) > 1 else (usual, usual)
    return Curve([(float(size), error) for size, error in points], falling=True, left=slopes, right=slopes)


def harm_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Measured divergence over squared error: proportional for small errors, of which it is a quadratic form."""
    return Curve(points, falling=False, left=(1.0, 1.0), right=(1.0, 2.0), powers=True)
