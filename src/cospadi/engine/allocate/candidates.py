"""Candidates of a group: ways to store it, their bytes, and what error to expect of them.

A *representation* is a method with fixed options; asked for a number of bytes, it returns a spec. A few specs of each
are solved quickly, and the errors of the others interpolated between them. Where the layers of a group share nothing,
each of them is a *piece* with errors and choices of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log

import torch
from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.engine.context import RunContext, shares_nothing
from cospadi.engine.factorise import solve
from cospadi.format import Spec
from cospadi.methods import Problem
from cospadi.methods.representation import Representation

TINY = 1e-30
LOWER = 0.55
"""Where the second of two anchors lies, as a share of the target."""


@dataclass(frozen=True)
class Trial:
    """One candidate whose error is known.

    Attributes:
        spec: of it, for the whole group.
        missed: squared output error per token, of each piece of the group.
        relative: ‖W − Ŵ‖ / ‖W‖ in the weights' own space.
    """

    spec: Spec
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
        apart: the problem for what its layers do not share, where each has a Gram of its own.
    """

    problem: Problem
    weight: Tensor
    widths: tuple[int, ...]
    apart: Problem

    @classmethod
    def of(cls, problem: Problem, widths: Sequence[int], apart: Problem | None = None) -> Task:
        """A problem whose weights lie side by side.

        Args:
            problem: of one group with one input.
            widths: columns of each piece.
            apart: see above; None: the same problem.
        """
        return cls(problem, torch.cat(problem.weights, 1).double(), tuple(widths), apart or problem)

    def missed(self, miss: Tensor) -> Tensor:
        """Squared output error per token of every column, each piece under its own Gram.

        Args:
            miss: error of the weights (d_in, n) float64.
        """
        if len(self.apart.grams) != len(self.widths) or len(self.widths) == 1:
            return (miss * (self.problem.grams[0] @ miss)).sum(0)
        parts = zip(torch.split(miss, list(self.widths), 1), self.apart.grams, strict=True)
        return torch.cat([(part * (gram @ part)).sum(0) for part, gram in parts])


def task_of(context: RunContext, spec: Spec, inputs: Statistics, widths: Sequence[int]) -> Task:
    """A group with one input as a task.

    Args:
        context: of the run.
        spec: any of the group.
        inputs: what is known of its input.
        widths: columns of each piece.
    """
    problem = context.problem_of(spec.modules, [inputs], spec.name)
    return Task.of(problem, widths, context.apart(problem, spec.modules, inputs.mean_gram, inputs.loss))


def solve_trial(task: Task, representation: Representation, spec: Spec) -> tuple[Trial, Tensor]:
    """Factorise with few rounds.

    Args:
        task: the group.
        representation: method and options.
        spec: what to reach.

    Returns:
        the trial, and Ŵ (d_in, n) float32 on the CPU, as packed and read back.
    """
    problem = task.apart if shares_nothing(spec) else task.problem
    found = spec.weight(solve(spec, representation.hurried, problem))
    miss = task.weight - found
    missed = tuple(float(part.sum()) for part in torch.split(task.missed(miss), list(task.widths)))
    relative = float(miss.norm() / task.weight.norm().clamp_min(TINY))
    return Trial(spec, missed, relative), found.float().cpu()


def anchors(specs: Sequence[Spec], target: int, count: int) -> list[Spec]:
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


def loss_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Measured divergence over squared error: proportional for small errors, of which it is a quadratic form."""
    return Curve(points, falling=False, left=(1.0, 1.0), right=(1.0, 2.0), powers=True)
