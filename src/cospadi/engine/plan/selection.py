"""Which linear layers a recipe compresses: all, those that `only` names, or those that the method is made for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from cospadi.errors import RecipeError
from cospadi.layers.shared_linear import METHOD as MASA
from cospadi.masa.retrofit.method import attention_modules
from cospadi.model_view import LinearGroup, ModelView
from cospadi.recipe import Recipe


def chosen_modules(view: ModelView, recipe: Recipe) -> tuple[str, ...]:
    """Names of the linear layers to compress, in model order.

    Raises:
        RecipeError: if a pattern of `only` matches no linear layer.
        ModelError: if the method is for attention and there is none.
    """
    if recipe.only is not None:
        return matching(view.module_names, recipe.only)
    return attention_modules(view) if recipe.method == MASA else view.module_names


def matching(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that one of the patterns matches: as a whole, or as one or several of the parts between the dots.

    ``q_proj``, ``self_attn``, ``layers.3`` and ``mlp.*_proj`` all match names of several layers.

    Raises:
        RecipeError: if a pattern matches none.
    """
    found: set[str] = set()
    for pattern in patterns:
        here = {name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")}
        if not here:
            leaves = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise RecipeError(f"only: {pattern!r} matches none of {len(names)} linear layers (they end in {leaves})")
        found |= here
    return tuple(name for name in names if name in found)


def restricted(view: ModelView, modules: Collection[str]) -> ModelView:
    """The view without the groups of which no module is chosen: their statistics are not needed."""
    wanted = set(modules)
    return replace(view, groups=tuple(group for group in view.groups if wanted & set(group.modules)))


def narrowed(group: LinearGroup, modules: Collection[str]) -> LinearGroup:
    """A group of siblings without those that are not chosen."""
    kept = [(name, d) for name, d in zip(group.modules, group.d_out, strict=True) if name in modules]
    return replace(group, modules=tuple(name for name, _ in kept), d_out=tuple(d for _, d in kept))
