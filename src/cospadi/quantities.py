"""Sizes and shares as people write them."""

import re

from cospadi.errors import RecipeError

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of ``"5GB"``, ``"500 mb"``, ``"1.5GiB"`` or a plain number (SI prefixes are powers of 1000).

    Raises:
        RecipeError: if the text is not a size.
    """
    found = _SIZE.fullmatch(text)
    if not found or float(found[1]) <= 0:
        raise RecipeError(f"{text!r} is not a size; write it as 5GB, 500MB or 1.5GiB")
    prefix = found[2].lower()
    base = 1024 if prefix.endswith("i") else 1000
    return int(float(found[1]) * base ** _POWERS[prefix.removesuffix("i")])


def parse_share(text: str) -> float:
    """The number of ``"0.8"``, ``"80%"`` or ``"0,8"``; whether it lies between 0 and 1 is not checked.

    Raises:
        RecipeError: if the text is not a number.
    """
    digits = text.strip().removesuffix("%").rstrip()
    try:
        value = float(digits.replace(",", "."))
    except ValueError:
        raise RecipeError(f"{text!r} is not a share; write it as 0.8 or 80%") from None
    return value / 100 if text.strip().endswith("%") else value
