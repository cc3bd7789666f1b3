"""Lists as people write them, on the command line with commas and in Python as sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cospadi.errors import BudgetError, RecipeError
from cospadi.quantities import parse_share

BITS = (16, 8, 4, 3, 2)
"""Bits of factors that a benchmark measures."""

Number = TypeVar("Number", int, float)
Words = str | float | Iterable[str | float | int] | None
"""A list: text with commas, a sequence, or one value."""


def words(value: Words) -> list[str]:
    """The parts of a list."""
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Iterable) else [value]
    return [text for part in parts if (text := str(part).strip())]


def shares(value: Words, name: str = "keep") -> list[float]:
    """The shares of ``"0.8,60%"`` or ``[0.8, 0.6]``.

    Args:
        value: the list.
        name: of the option, for messages.

    Raises:
        RecipeError: if one is not a number.
        BudgetError: if one is not between 0 and 1; in text a comma separates shares, so ``0,3`` is two of them.
    """
    try:
        found = [parse_share(part) for part in words(value)]
    except RecipeError:
        raise RecipeError(f"{name} {value!r}: pass shares separated by commas, for example {name} 0.8,0.6") from None
    if not all(0 < share < 1 for share in found):
        raise BudgetError(
            f"{name} {value!r}: each share must lie between 0 and 1; write 0.3 or 30%, and several as 0.8,0.6"
        )
    return found


def numbers(
    value: Words, name: str, kind: Callable[[str], Number], fits: Callable[[Number], bool], wanted: str
) -> tuple[Number, ...]:
    """The distinct numbers of a list, in the order given.

    Args:
        value: the list.
        name: of the option, for messages.
        kind: what reads one, such as ``int``.
        fits: whether a number is allowed.
        wanted: what is allowed, for messages.

    Raises:
        RecipeError: if a part is not a number, or does not fit.
    """
    found: list[Number] = []
    for word in words(value):
        try:
            number = kind(word)
        except (ValueError, RecipeError):
            raise RecipeError(f"{name} {word!r}: give {wanted}") from None
        if not fits(number):
            raise RecipeError(f"{name} {word!r}: give {wanted}")
        found.append(number)
    return tuple(dict.fromkeys(found))


def token_counts(value: Words, name: str = "tokens") -> tuple[int, ...]:
    """Numbers of tokens.

    Raises:
        RecipeError: if one is not a whole number above 0.
    """
    return numbers(value, name, int, lambda count: count > 0, "whole numbers above 0, such as 1,2048")


def ways(keep: Words, bits: Words, prefix: str = "") -> tuple[tuple[float, int], ...]:
    """Pairs of keep and bits; a keep without its own bits (``0.4:8``) is combined with all of `bits`.

    Args:
        keep: shares above 0 and up to 1.
        bits: of the factors.
        prefix: of the names of options, for messages.

    Raises:
        RecipeError: if a word is not a share, or not a number of bits, or if there is none.
    """
    widths = _widths(bits, f"{prefix}bits")
    found: list[tuple[float, int]] = []
    for word in words(keep):
        share, _, width = word.partition(":")
        wanted = "shares above 0 and up to 1, such as 0.6,0.4 or 60%:16,40%:8"
        keeps = numbers(share, f"{prefix}keep", parse_share, lambda keep: 0 < keep <= 1, wanted)
        found += [(keep, own) for keep in keeps for own in (_widths(width, f"{prefix}keep") if width else widths)]
    if not found:
        raise RecipeError(f"nothing to measure: {prefix}keep and {prefix}bits each need at least one number")
    return tuple(dict.fromkeys(found))


def _widths(value: Words, name: str) -> tuple[int, ...]:
    return numbers(value, name, int, lambda width: width in BITS, f"some of {','.join(map(str, BITS))}")
