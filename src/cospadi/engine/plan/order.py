"""In what order a plan is carried out, and on which Grams: by group or layer by layer, tokens weighted or not."""

from __future__ import annotations

from dataclasses import dataclass

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
    compressed = recipe.anchor or recipe.sequential is True
    if recipe.sequential is None and get_method(recipe.method).wants_sequential(recipe.options):
        compressed = compressed or all(isinstance(g.spec, GroupSpec) and g.own_input for g in plan.groups)
    return Order(compressed or recipe.refine is not None, compressed)


def plain_share(recipe: Recipe) -> float:
    """Share of the plain Gram in those that solves get: 1 unless the recipe, or its method, wants weighted ones."""
    return recipe.gram_blend if (recipe.gram or get_method(recipe.method).gram) == "loss" else 1.0
