"""Options under their flat names, as commands and functions take them, turned into a recipe.

In a recipe, ``samples``, ``seq_len`` and ``text_field`` lie in one section and the options of a method in another; on
the command line and in Python each has one name. Both come here, so a new field of :class:`~cospadi.recipe.Recipe` or
of :class:`~cospadi.recipe.Calibration` needs no further list. Imports torch only to look up the options of a method.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from cospadi.aliases import ALIASES, canonical
from cospadi.errors import RecipeError
from cospadi.recipe import Calibration, Recipe, with_prune

_RENAMED = {"source": "calibration", "field": "text_field"}
CALIBRATION = {_RENAMED.get(field, field): field for field in Calibration.model_fields}
"""Flat name → field of the section ``calibration``."""

SETTINGS = (*(name for name in Recipe.model_fields if name not in CALIBRATION), *CALIBRATION)
"""Flat names of everything that a recipe holds."""

PRUNE = ("method", "blocks", "keep_blocks", "options", *CALIBRATION, "drop_extra", "device", "seed")
"""Flat names of everything that a run takes which only prunes."""


class _Method(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def options(self) -> type[BaseModel]: ...


_Methods = tuple[_Method, Mapping[str, _Method]]
"""The method of a run, and all of its kind by name."""


def recipe_from(
    recipe: Recipe | dict[str, Any] | str | Path | None, given: Mapping[str, Any], *, source: str = "options"
) -> Recipe:
    """The recipe of a run that compresses.

    Args:
        recipe: a recipe, its keys and values, or the path of one; None: the defaults.
        given: flat options that override it; None means not given. A name that no recipe has must be an option of the
            method; one that both have is the recipe's, and the method's goes into ``options``.
        source: where `given` comes from, for messages.

    Raises:
        RecipeError: on an unknown name (naming the nearest) or a wrong value.
        BudgetError: if both `keep` and `target_size` are given.
    """
    base = Recipe.of(recipe)

    def methods() -> _Methods:
        from cospadi.methods import all_methods, get_method

        return get_method(given.get("method") or base.method), all_methods()

    return base.merged(_changes(given, SETTINGS, methods), source=source)


def prune_recipe_from(
    recipe: Recipe | dict[str, Any] | str | Path | None, given: Mapping[str, Any], *, source: str = "options"
) -> Recipe:
    """The recipe of a run that only prunes: method, size and options go to its section ``prune``.

    Args:
        recipe: as for :func:`recipe_from`.
        given: as for :func:`recipe_from`.
        source: as for :func:`recipe_from`.

    Raises:
        RecipeError: on an unknown name (naming the nearest) or a wrong value.
        BudgetError: if both `blocks` and `keep_blocks` are given.
    """
    base = with_prune(Recipe.of(recipe))
    assert base.prune is not None
    chosen = given.get("method") or base.prune.method

    def methods() -> _Methods:
        from cospadi.pruning import all_pruning_methods, get_pruning_method

        return get_pruning_method(chosen), all_pruning_methods()

    changes = _changes(given, PRUNE, methods)
    section = {key: changes.pop(key) for key in ("method", "blocks", "keep_blocks", "options") if key in changes}
    return with_prune(base.merged(changes, source=source), **section)


def _changes(given: Mapping[str, Any], known: Collection[str], methods: Callable[[], _Methods]) -> dict[str, Any]:
    """Flat options as changes to a recipe, with its sections ``calibration`` and ``options``."""
    found: dict[str, Any] = {}
    section: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name == "calibration" and type(value) is dict:  # the section itself, as a recipe holds it
            section = {**value, **section}
        elif name in CALIBRATION:
            section[CALIBRATION[name]] = str(value) if isinstance(value, Path) else value
        elif name in known:
            found[name] = str(value) if name == "device" else list(value) if isinstance(value, tuple) else value
        else:
            others[name] = value
    if others:
        found["options"] = canonical(found.get("options") or {}) | _of_method(others, known, *methods())
    return found | ({"calibration": section} if section else {})


def _of_method(
    others: Mapping[str, Any], known: Collection[str], method: _Method, methods: Mapping[str, _Method]
) -> dict[str, Any]:
    """Names that belong to no recipe: options of the method.

    Raises:
        RecipeError: if one is not, naming the methods that have it or the nearest name.
    """
    options = method.options.model_fields
    for name in others:
        if name in options or ALIASES.get(name) in options:
            continue
        having = [other.name for other in methods.values() if name in other.options.model_fields]
        if having:
            raise RecipeError(f"method {method.name!r} has no option {name!r}; methods with it: {', '.join(having)}")
        near = difflib.get_close_matches(name, [*known, *options], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"method {method.name!r} takes {', '.join(options) or 'none'}"
        raise RecipeError(f"unknown option {name!r}; {hint}")
    return canonical(others, list(options))
