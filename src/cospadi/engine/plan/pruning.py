"""What a recipe's section ``prune`` means: a decision on a model with text, sizes from a configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cospadi.checkpoint import is_compressed
from cospadi.engine.plan.selection import chosen_modules, narrowed, restricted
from cospadi.errors import BudgetError, RecipeError
from cospadi.model_view import ModelView, config_of, discover, discover_layers, skeleton
from cospadi.progress import Progress
from cospadi.pruning import Edit, Evidence, Tokens, block_bytes, get_pruning_method, without_blocks
from cospadi.pruning.base import fewest_blocks
from cospadi.recipe import Prune, Recipe
from cospadi.runtime.devices import widened


def decide(section: Prune, evidence: Evidence) -> Edit:
    """What a recipe's section ``prune`` means for a model.

    Raises:
        BudgetError: if the size cannot be reached.
        RecipeError: if the method or one of its options does not exist.
    """
    check_section(section)
    method = get_pruning_method(section.method)
    if section.blocks is not None:
        return method.remove(evidence, section.blocks, section.options)
    assert section.keep_blocks is not None
    return method.shrink(evidence, section.keep_blocks, section.options)


def check_section(section: Prune) -> None:
    """Look whether the method and its options exist, and whether the section says how much goes.

    Raises:
        BudgetError: if it does not.
        RecipeError: if there is no such method or option.
    """
    get_pruning_method(section.method).check(section.options)
    section.require_size()


def prune_first(
    view: ModelView, recipe: Recipe, ids: Tensor, device: torch.device, progress: Progress
) -> tuple[ModelView, Recipe, dict[str, Any]]:
    """Prune a model that is then to be compressed under one budget.

    Args:
        view: of the model, with its linear groups; the model is changed in place.
        recipe: with a section ``prune``.
        ids: calibration text (sequences, length).
        device: where layers run.
        progress: called as progress(phase, done, total, detail, error).

    Returns:
        a view of the pruned model with its linear groups; the recipe whose `keep` counts against that model; and what
        was cut, for the report.

    Raises:
        BudgetError: if pruning alone meets the budget.
        RecipeError: if what is left is no model whose layers can be factorised.
    """
    assert recipe.prune is not None
    before = chosen_bytes(view, recipe)
    whole = list(view.model.parameters())  # tied ones stand once
    told = {
        "method": recipe.prune.method,
        "bytes_before": before,
        "file_bytes_before": sum(p.numel() * p.element_size() for p in whole),
        "parameters": sum(p.numel() for p in whole),
    }
    with widened(view.model, device):
        edit = decide(recipe.prune, Evidence(view, Tokens(ids), device, recipe.seed, progress))
    model = edit.apply(view)
    if is_compressed(model.config):
        raise RecipeError(
            f"pruning method {recipe.prune.method!r} with these options creates layers of its own, which cannot be "
            "factorised afterwards: choose a method that keeps the architecture"
        )
    pruned = discover(model)
    pruned = restricted(pruned, chosen_modules(pruned, recipe))
    after = chosen_bytes(pruned, recipe)
    return pruned, remaining(recipe, before, after), edit.facts() | told | {"bytes_after": after}


def remaining(recipe: Recipe, before: int, after: int) -> Recipe:
    """The recipe for a pruned model: `keep` counts against what is left of its layers.

    Args:
        recipe: its `keep` counts against the original model.
        before: bytes of the original model's linear layers.
        after: of those of the pruned one.

    Raises:
        BudgetError: if pruning alone meets the budget.
    """
    if recipe.keep is None:
        return recipe  # a target size holds for all files together, pruned or not
    if after <= recipe.keep * before:
        raise BudgetError(
            f"pruning alone keeps {after / before:.4f} of the linear layers' bytes, within keep {recipe.keep:g}: "
            "nothing is left to compress; use `cospadi prune`, prune less, or keep less"
        )
    return recipe.model_copy(update={"keep": recipe.keep * before / after})


def estimate_prune(model: object, recipe: Recipe) -> dict[str, Any]:
    """How many blocks would go and what would be left, from the configuration alone.

    Raises:
        BudgetError: if the size cannot be reached.
        RecipeError: if the method or one of its options does not exist.
    """
    section = recipe.prune or Prune()
    check_section(section)
    method = get_pruning_method(section.method)
    config, name = config_of(model)
    empty = skeleton(config)
    sizes = [block_bytes(layer) for layer in discover_layers(empty).layers]
    data: dict[str, Any] = {
        "model": name,
        "architecture": (config.architectures or [type(empty).__name__])[0],
        "method": method.name,
        "blocks_before": len(sizes),
        "bytes_before": sum(sizes),
    }
    if method.unit == "share":
        if section.keep_blocks is None:
            raise BudgetError(f"method {method.name!r} removes no whole blocks: pass --keep-blocks")
        return data | {"blocks_after": len(sizes), "bytes_after": int(section.keep_blocks * sum(sizes))}
    gone = _count(section, sizes)
    left = sum(sorted(sizes)[: len(sizes) - gone])
    return data | {"blocks_after": len(sizes) - gone, "bytes_after": left, "keep_actual": left / sum(sizes)}


def _count(section: Prune, sizes: list[int]) -> int:
    """How many blocks go, at least."""
    if section.blocks is None:
        gone = fewest_blocks(sizes, float(section.keep_blocks or 0) * sum(sizes))
    else:
        gone = section.blocks
    if gone >= len(sizes):
        raise BudgetError(f"cannot remove {gone} of {len(sizes)} blocks: at least one must stay")
    return gone


def prune_skeleton(view: ModelView, recipe: Recipe) -> tuple[ModelView, Recipe, int]:
    """Take as many blocks out of a model on ``meta`` as a recipe says; which ones is not known yet.

    Returns:
        a view of what is left, the recipe whose `keep` counts against that, and the bytes of the linear layers gone.

    Raises:
        BudgetError: if that many cannot go, or pruning alone meets the budget, or the method removes no whole blocks.
    """
    assert recipe.prune is not None
    check_section(recipe.prune)
    if get_pruning_method(recipe.prune.method).unit != "blocks":
        raise BudgetError(f"method {recipe.prune.method!r} cannot be planned from the configuration alone")
    before = chosen_bytes(view, recipe)
    gone = _count(recipe.prune, [block_bytes(layer) for layer in view.layers])
    first = max(0, len(view.layers) - 1 - gone)
    without_blocks(view, range(first, first + gone))
    pruned = discover(view.model)
    after = chosen_bytes(pruned, recipe)
    return pruned, remaining(recipe, before, after), before - after


def chosen_bytes(view: ModelView, recipe: Recipe) -> int:
    """Bytes of the linear layers that a recipe compresses, at 16 bits a weight."""
    modules = chosen_modules(view, recipe)
    return sum(narrowed(group, modules).dense_bytes for group in view.groups)
