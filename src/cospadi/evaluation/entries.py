"""The rows of a comparison: every method at every size, named recipes, and plain quantisers as references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cospadi.aliases import canonical
from cospadi.engine.plan.pruning import check_section
from cospadi.errors import RecipeError
from cospadi.methods import get_method
from cospadi.pruning import all_pruning_methods
from cospadi.quantities import parse_share
from cospadi.recipe import Recipe

REFERENCE_BITS = (8, 4, 3)


@dataclass(frozen=True)
class Entry:
    """A row before it is computed.

    Attributes:
        method: its name in the table.
        keep: requested share; None for a reference, whose size follows from its number of bits.
        recipe: of the run.
        only_prunes: whether only the recipe's section ``prune`` is carried out.
    """

    method: str
    keep: float | None
    recipe: Recipe
    only_prunes: bool = False

    @property
    def slug(self) -> str:
        """Name of the row's directory."""
        size = f"{self.recipe.options['bits']}bit" if self.keep is None else f"{self.keep:g}"
        return f"{self.method}-{size}"


def make_entries(
    base: Recipe,
    methods: Sequence[str],
    keeps: Sequence[float | str],
    options: Mapping[str, Mapping[str, Any]],
    recipes: Mapping[str, Recipe],
    references: Sequence[str],
) -> list[Entry]:
    """The rows of a comparison, with all methods and options checked.

    Raises:
        RecipeError: on an unknown method or option, options for a method that is not compared, or a name used twice.
        BudgetError: if a keep is not between 0 and 1.
    """
    shares = [parse_share(keep) if isinstance(keep, str) else keep for keep in keeps]
    if not methods and not recipes:
        raise RecipeError("nothing to compare: pass --methods, for example --methods svd,pursuit")
    if not shares and (methods or not all(recipe.keep for recipe in recipes.values())):
        raise RecipeError("no size given: pass --keep, for example --keep 0.8,0.6")
    for name in options:
        if name not in methods:
            raise RecipeError(f"options are set for {name!r}, which is not among the methods ({', '.join(methods)})")
    if twice := sorted({*methods} & {*recipes}):
        raise RecipeError(f"{twice[0]!r} is both a method and the name of a recipe: rename the recipe")
    entries = []
    bare = base.model_copy(update={"options": {}, "target_size": None})
    pruning = all_pruning_methods()
    for keep in dict.fromkeys(shares):
        for name in dict.fromkeys(methods):
            if name in pruning:
                entries.append(Entry(name, keep, _pruning(bare, name, keep, options.get(name, {})), only_prunes=True))
                continue
            chosen = (base.options if name == base.method else {}) | canonical(options.get(name, {}))
            entries.append(Entry(name, keep, bare.merged({"method": name, "keep": keep, "options": chosen})))
    common = {"calibration": base.calibration.model_dump(), "device": base.device, "seed": base.seed}
    common |= {"only": base.only} if base.only is not None else {}
    for name, recipe in recipes.items():
        for keep in [recipe.keep] if recipe.keep else dict.fromkeys(shares):
            made = recipe.merged(common | {"keep": keep, "target_size": None})
            section = made.prune
            if section is not None and section.blocks is None and section.keep_blocks is None:
                made = _pruning(made, section.method, keep, {})
                entries.append(Entry(name, keep, made, only_prunes=True))
            else:
                entries.append(Entry(name, keep, made))
    for name in dict.fromkeys(references):
        if name not in methods:
            for bits in REFERENCE_BITS:
                # the number of bits determines the size; keep only has to be large enough
                plain = {"method": name, "keep": 0.99, "options": {"bits": bits}}
                entries.append(Entry(name, None, Recipe().merged(common | plain)))
    for entry in entries:
        get_method(entry.recipe.method).check(entry.recipe.options)
        if entry.recipe.prune is not None:
            check_section(entry.recipe.prune)
    return entries


def _pruning(bare: Recipe, name: str, keep: float, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a row that only prunes, as little as `keep` allows."""
    own = bare.prune.options if bare.prune is not None and bare.prune.method == name else {}
    section = {"method": name, "blocks": None, "keep_blocks": keep, "options": own | dict(options)}
    return bare.model_copy(update={"prune": None}).merged({"keep": keep, "prune": section})
