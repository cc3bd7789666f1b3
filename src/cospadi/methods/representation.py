"""Ways to store a group that an allocation may choose from: a method with options, and where it is worth trying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cospadi.errors import BudgetError
from cospadi.format import GroupShape, Spec
from cospadi.methods.base import Method, get_method

QUICK = {"rounds": 8, "refits": 1, "clip_search": 4, "search": 8, "sweeps": 0, "rescale": 0}
"""Most of each of these options in a trial. Errors of all sizes suffer alike, so comparisons stand."""
FURTHER = 2.0
"""How many times below the least share a size may lie that is the only one of its representation."""


@dataclass(frozen=True)
class Representation:
    """A method with options, and the shares of bytes between which it is worth trying.

    Attributes:
        method: its name.
        options: of that method.
        least: least share of the bytes at 16 bits at which it is tried.
        most: largest such share.
        costly: whether it is solved at few sizes only, and given up for groups of a kind where it was far behind.
        fixed: whether the options leave no choice of size.
        learnt: whether its errors, relative to those of others, are carried over from groups of the same kind.
        each: whether the layers of a group share nothing, so that each of them may choose for itself.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    least: float = 0.0
    most: float = 1.0
    costly: bool = False
    fixed: bool = False
    learnt: bool = False
    each: bool = False

    def specs(self, shape: GroupShape, shares: Sequence[float]) -> list[Any]:
        """The distinct specs within the range at the given shares of the dense bytes, by rising bytes."""
        method, found = get_method(self.method), {}
        if self.fixed:
            try:
                spec = method.spec(shape, shape.dense_bytes, self.options)
            except BudgetError:  # a layer so small that padding alone takes more than it has
                return []
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
        """The options of a trial: the same with few rounds."""
        full = get_method(self.method).check(self.options)
        return self.options | {
            key: min(full[key], most) for key, most in QUICK.items() if isinstance(full.get(key), int)
        }

    def smallest(self, shape: GroupShape) -> Spec:
        """The least spec, whatever the range."""
        return get_method(self.method).least(shape, self.options)


def representations(method: Method, options: dict[str, Any]) -> list[Representation]:
    """What an allocation may choose from: what the method offers, else the method itself with its options."""
    if method.offers is None:
        return [Representation(method.name, options)]
    return method.offers(method.check(options))
