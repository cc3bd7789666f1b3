"""Other packages' names for options of ours. Imports no torch, so that recipes are read quickly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cospadi.errors import RecipeError

ALIASES = {"num_bits": "bits", "group_size": "group"}
"""compressed-tensors' name → the name under which a recipe stores the option."""


def canonical(options: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Options under their canonical names.

    Args:
        options: as the user gives them.
        known: names that a method takes. A method of another package may itself call its option ``group_size``; then
            that name wins.

    Returns:
        the same values in the same order.

    Raises:
        RecipeError: if an option is given under both names.
    """
    found: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if known and name not in known:
            name = next((alias for alias, ours in ALIASES.items() if ours == name and alias in known), given)
        if name in found:
            both = " and ".join(repr(key) for key in options if key == name or ALIASES.get(key) == name)
            raise RecipeError(f"the options {both} are the same: give only one")
        found[name] = value
    return found


BOS = ("auto", "on", "off")
"""Whether sequences begin with the BOS token: as the tokenizer does it, always, never."""


def canonical_bos(value: object) -> str:
    """One of `BOS`; YAML reads a bare ``on`` and ``off`` as true and false.

    Raises:
        RecipeError: if it is something else.
    """
    word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    if isinstance(word, str) and word in BOS:
        return word
    raise RecipeError(f"bos must be auto, on or off, not {value!r}")
