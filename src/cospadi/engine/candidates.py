"""Candidates of a group: ways to store it, their bytes, and what error to expect of them.

A *family* is a method with fixed options; asked for a number of bytes, it gives a spec. A few members of each family
are solved quickly, and the errors of the others interpolated between them.
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
from cospadi.engine.factorise import factorise_group, rebuild
from cospadi.engine.plan import least_spec
from cospadi.errors import BudgetError
from cospadi.format import GroupSpec
from cospadi.methods import GroupShape, get_method

TINY = 1e-30
QUICK = {"rounds": 8, "refits": 1, "clip_search": 4, "search": 8, "sweeps": 0}
"""Most of each of these options in a trial. Errors of all sizes suffer alike, so comparisons stand."""


@dataclass(frozen=True)
class Family:
    """A method with options.

    Attributes:
        method: its name.
        options: of that method.
        least: least share of bytes at which it is tried.
        most: largest such share.
        costly: whether it is given up where it has shown to be far behind.
        fixed: whether the options leave no choice of size.
        learnt: whether its errors, compared to those of other families, are carried over from other groups.
    """

    method: str
    options: dict[str, Any]
    least: float = 0.0
    most: float = 1.0
    costly: bool = False
    fixed: bool = False
    learnt: bool = False

    def specs(self, shape: GroupShape, shares: Sequence[float]) -> list[GroupSpec]:
        """The distinct specs within the family's range at the given shares of the dense bytes, by rising bytes."""
        method, found = get_method(self.method), {}
        if self.fixed:
            spec = method.spec(shape, shape.dense_bytes, self.options)
            return [spec] if shares[0] <= spec.bytes / shape.dense_bytes <= shares[-1] else []
        for share in shares:
            if not self.least <= share <= self.most:
                continue
            try:
                spec = method.spec(shape, int(share * shape.dense_bytes), self.options)
            except BudgetError:
                continue
            found[spec.bytes] = spec
        return [found[size] for size in sorted(found)]

    def smallest(self, shape: GroupShape) -> GroupSpec:
        """The least spec, whatever the range."""
        return least_spec(shape, get_method(self.method), self.options)


@dataclass(frozen=True)
class Trial:
    """One candidate whose error is known.

    Attributes:
        spec: of it.
        missed: squared output error per token.
        relative: ‖W − Ŵ‖ / ‖W‖ in the weights' own space.
        weight: Ŵ (d_in, sum of d_out) float32 on the CPU, as packed and read back; None if it was not solved.
    """

    spec: GroupSpec
    missed: float
    relative: float
    weight: Tensor | None


def solve_trial(
    family: Family,
    spec: GroupSpec,
    weights: list[Tensor],
    statistics: Statistics,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Trial:
    """Factorise with few rounds; see :func:`~cospadi.engine.factorise.factorise_group` for the arguments."""
    method = get_method(family.method)
    full = method.check(family.options)
    hurried = {key: min(full[key], most) for key, most in QUICK.items() if isinstance(full.get(key), int)}
    tensors, info = factorise_group(
        method, family.options | hurried, spec, weights, statistics, seed=seed, device=device, dtype=dtype
    )
    weight = torch.cat([w.float() for w in weights], 1).cpu()
    found = rebuild(tensors, spec).float()
    relative = float((weight - found).norm() / weight.norm().clamp_min(TINY))
    return Trial(spec, float(info["missed"]), relative, found)


def anchors(specs: Sequence[GroupSpec], target: int, count: int) -> list[GroupSpec]:
    """Specs to solve: all if they are few, else `count`, spread evenly by the logarithm of their bytes.

    Args:
        specs: distinct, by rising bytes.
        target: bytes near which one anchor shall lie.
        count: at least 2.
    """
    if len(specs) <= count:
        return list(specs)
    low, high = log(specs[0].bytes), log(specs[-1].bytes)
    wanted = [low + (high - low) * i / (count - 1) for i in range(count)]
    if count > 2:
        wanted[min(range(1, count - 1), key=lambda i: abs(wanted[i] - log(target)))] = log(target)
    chosen = {min(range(len(specs)), key=lambda i: abs(log(specs[i].bytes) - at)) for at in wanted}
    return [specs[i] for i in sorted(chosen)]


class Curve:
    """A positive quantity y over a positive x, straight between known points on logarithmic axes.

    Args:
        points: (x, y); y of 0 counts as next to nothing.
        falling: y is made to fall (or not) with x; otherwise to rise.
        slopes: least and largest slope of the logarithms beyond the known points, to the left and to the right.
    """

    def __init__(
        self,
        points: Sequence[tuple[float, float]],
        *,
        falling: bool,
        left: tuple[float, float] = (-inf, inf),
        right: tuple[float, float] = (-inf, inf),
    ) -> None:
        ordered = sorted((log(max(x, TINY)), log(max(y, TINY))) for x, y in points)
        self.x: list[float] = []
        self.y: list[float] = []
        for x, y in ordered:
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
        at = log(max(x, TINY))
        if at <= self.x[0]:
            return self._beyond(at, 0, self._slope(0), self.left)
        if at >= self.x[-1]:
            return self._beyond(at, -1, self._slope(len(self.x) - 2), self.right)
        right = bisect_left(self.x, at)
        return exp(self.y[right - 1] + (at - self.x[right - 1]) * self._slope(right - 1))

    def _slope(self, index: int) -> float:
        if len(self.x) < 2:
            return 0.0
        return (self.y[index + 1] - self.y[index]) / (self.x[index + 1] - self.x[index])

    def _beyond(self, at: float, end: int, slope: float, limits: tuple[float, float]) -> float:
        slope = min(max(slope, limits[0]), limits[1])
        return exp(min(self.y[end] + (at - self.x[end]) * slope, 700.0))
