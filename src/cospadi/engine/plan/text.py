"""Whether a run reads calibration text."""

from __future__ import annotations

from cospadi.engine.plan.order import plain_share
from cospadi.methods import get_method
from cospadi.pruning import get_pruning_method
from cospadi.recipe import Recipe


def needs_text(recipe: Recipe) -> bool:
    """Whether a recipe cannot be carried out without calibration text.

    A method may need none; whatever follows the hidden states or gradients, or weighs tokens, layers, pairs or blocks
    by them, does.
    """
    method = get_method(recipe.method)
    return (
        method.text
        or (recipe.allocation or method.allocation) != "uniform"
        or (recipe.grouping or method.grouping) == "pairs"
        or bool(recipe.sequential)
        or plain_share(recipe) < 1
        or recipe.anchor
        or recipe.refine is not None
        or (recipe.prune is not None and get_pruning_method(recipe.prune.method).text)
    )


def reads_text(recipe: Recipe) -> bool:
    """Whether a run calibrates: it has a text, or cannot do without one."""
    return recipe.calibration.source is not None or needs_text(recipe)
