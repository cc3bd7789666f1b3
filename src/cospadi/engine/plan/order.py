"""In what order a plan is carried out, and on which Grams: by group or layer by layer, tokens weighted or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cospadi.engine.plan.plan import Plan
from cospadi.format import GroupSpec
from cospadi.methods import get_method
from cospadi.recipe import Recipe


@dataclass(frozen=True)
class Order:
    """How the groups of a plan follow each other.

    Attributes:
        layers: layer by layer, each on the outputs of the compressed layers before it; else every group by itself.
        compressed: Grams are those of the compressed layers' outputs, not of the original model.
    """

    layers: bool
    compressed: bool


def order_of(recipe: Recipe, plan: Plan) -> Order:
    """The order that a recipe asks for, or else its method publishes.

    A method's own wish is dropped where a group spans several decoder layers or has no dictionary and codes; what the
    recipe asks for is not, see `cospadi.engine.tune.sequential.require_layers`.
    """
    compressed = bool(recipe.anchor) or recipe.sequential is True
    if recipe.sequential is None and get_method(recipe.method).wants_sequential(recipe.options):
        compressed = compressed or all(isinstance(g.spec, GroupSpec) and g.own_input for g in plan.groups)
    return Order(compressed or recipe.refine is not None, compressed)


def plain_share(recipe: Recipe) -> float:
    """Share of the plain Gram in those that solves get: 1 unless the recipe, or its method, wants weighted ones."""
    return recipe.gram_blend if (recipe.gram or get_method(recipe.method).gram) == "loss" else 1.0


def suited(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with what it leaves open, options and fields, as its method wants them on a device.

    Layers are not worked on in order where the recipe refuses that, or asks for groups across layers.
    """
    method = get_method(recipe.method)
    options = method.options_on(device.type, recipe.options)
    changes: dict[str, Any] = {"options": options} if options != recipe.options else {}
    if method.wishes is not None:
        wanted = dict(method.wishes(device.type, method.check(options)))
        if recipe.sequential is False or recipe.grouping in ("cross_layer", "pairs"):
            wanted = {key: value for key, value in wanted.items() if key == "gram"}
        changes |= {key: value for key, value in wanted.items() if getattr(recipe, key) is None}
        if recipe.anchor is False:
            changes.pop("anchor_share", None)
    return recipe.merged(changes) if changes else recipe
