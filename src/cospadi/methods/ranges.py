"""The values that options may have. A method's signature uses these types; `Method.check` refuses all other values."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from cospadi.format.patterns import parse_pattern

Count = Annotated[int, Field(ge=1)]
"""Rounds and steps of which at least one is needed."""

Natural = Annotated[int, Field(ge=0)]
"""Rounds and steps that may be omitted."""

NonNegative = Annotated[float, Field(ge=0)]
"""Ridges and damping, as shares of a mean; powers."""

Positive = Annotated[float, Field(gt=0)]
"""Learning rates."""

Below1 = Annotated[float, Field(ge=0, lt=1)]
"""Tolerances, as shares."""

AtomsPerNonzero = Annotated[float, Field(ge=1)]
"""rho = k/s: a column cannot have more non-zeros than there are atoms."""

FactorBits = Literal[2, 3, 4, 8, 16]
"""Bits of a dictionary value, or of a weight that survives pruning."""

ValueBits = Literal[2, 3, 4, 8, 14, 16]
"""Bits of a value of sparse codes."""


def _known_or_auto(pattern: str) -> str:
    if pattern != "auto":
        parse_pattern(pattern)
    return pattern


def _balanced_or_none(pattern: str) -> str:
    if pattern and parse_pattern(pattern) is None:
        raise ValueError("pruning takes a pattern n:m, or none")
    return pattern


CodePattern = Annotated[str, AfterValidator(_known_or_auto)]
"""``"free"``, ``"n:m"`` or ``"auto"``."""

PruningPattern = Annotated[str, AfterValidator(_balanced_or_none)]
"""``"n:m"``, or empty."""


def range_text(metadata: Iterable[Any]) -> str:
    """The range that a field's constraints allow, in words; empty if there are none.

    Args:
        metadata: of a pydantic field.
    """
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = [f"{word} {getattr(item, key)}" for item in metadata for key, word in words.items() if hasattr(item, key)]
    return " and ".join(bounds)
