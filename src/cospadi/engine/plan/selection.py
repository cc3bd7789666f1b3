"""Which linear layers a recipe compresses: all, those that `only` names, or those that the method is made for."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from cospadi.errors import ModelError, RecipeError
from cospadi.methods import get_method
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
    return attention_modules(view) if get_method(recipe.method).covers == "attention" else view.module_names


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


def attention_modules(view: ModelView) -> tuple[str, ...]:
    """Names of the linear layers inside attention: below a module whose forward takes an attention mask.

    Raises:
        ModelError: if there are none.
    """
    found = tuple(name for name in view.module_names if _inside_attention(view, name))
    if not found:
        raise ModelError(
            f"{type(view.model).__name__}: found no linear layers inside attention; name the layers with --only"
        )
    return found


def _inside_attention(view: ModelView, name: str) -> bool:
    parts = name.removeprefix(f"{view.layers_name}.").split(".")
    for end in range(2, len(parts)):  # from the first child of the decoder layer down to the linear layer's parent
        parent = view.module(f"{view.layers_name}.{'.'.join(parts[:end])}")
        if "attention_mask" in inspect.signature(type(parent).forward).parameters:
            return True
    return False
