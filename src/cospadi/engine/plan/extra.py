"""Stored tensors that the model's class does not take: copied, refused where they cannot be, or left out if asked."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping

from transformers import PreTrainedConfig

from cospadi.checkpoint.fitting import extra_tensors
from cospadi.checkpoint.headers import Entry
from cospadi.engine.plan.target import ENTRY, INDEX_ENTRY
from cospadi.errors import BudgetError, ModelError
from cospadi.model_view import ModelView
from cospadi.pruning import get_pruning_method
from cospadi.quantities import parse_size
from cospadi.recipe import Recipe

_COUNTED = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
"""Occurs in the names of tensors, and of configuration entries, of multi-token prediction."""


def carried_tensors(source: object, view: ModelView, recipe: Recipe) -> dict[str, Entry]:
    """The stored tensors that a run copies because the model's class does not take them; a warning tells of them.

    Args:
        source: of the model: local directory or hub id; a model in memory has only what its class takes.
        view: of the model, real or on ``meta``. If the tensors are left out, its configuration forgets them.
        recipe: `drop_extra` leaves them out.

    Returns:
        by the names under which they are stored.

    Raises:
        ModelError: if they would not fit the result.
        CheckpointError: if a weight file is damaged.
    """
    found = extra_tensors(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else {}
    if not found:
        return {}
    model = view.model
    size = extra_bytes(found)
    what = f"{len(found)} stored tensors ({size:,} bytes; first: {min(found)}) do not belong to {type(model).__name__}"
    if recipe.drop_extra:
        for config in (model.config, model.config.get_text_config()):
            _forget(config)
        warnings.warn(f"{what} and are left out", stacklevel=2)
        return {}
    why = _misfit(found, view, recipe)
    if why:
        raise ModelError(f"{what}, and would not fit the result: {why}; pass --drop-extra to leave them out")
    warnings.warn(f"{what}; they are copied unchanged", stacklevel=2)
    return found


def extra_bytes(extra: Mapping[str, Entry]) -> int:
    """Bytes of tensors on disk."""
    return sum(entry.bytes for entry in extra.values())


def without_extra(recipe: Recipe, extra: Mapping[str, Entry]) -> Recipe:
    """A recipe whose target size is what the copied tensors, with their headers, leave for everything else."""
    if recipe.target_size is None or not extra:
        return recipe
    headers = sum(2 * len(name) + ENTRY + INDEX_ENTRY for name in extra)
    left = parse_size(recipe.target_size) - extra_bytes(extra) - headers
    if left < 1:
        raise BudgetError(
            f"target size {recipe.target_size} is less than the {extra_bytes(extra):,} bytes of tensors that are "
            "copied unchanged; pass --drop-extra to leave them out"
        )
    return recipe.model_copy(update={"target_size": str(left)})


def _misfit(found: dict[str, Entry], view: ModelView, recipe: Recipe) -> str:
    """Why tensors that are copied unchanged would not go with what a run makes; empty if they do."""
    owners = {name.rpartition(".")[0]: name for name in found}
    for module in view.module_names:
        if module in owners:
            return f"{owners[module]} is of a layer that is compressed"
    if recipe.prune is None:
        return ""
    if get_pruning_method(recipe.prune.method).unit != "blocks":
        return "they were trained with the original width"
    blocks = view.layers_name.removeprefix(f"{view.model.base_model_prefix}.")
    inside = next((name for name in sorted(found) if f".{blocks}." in f".{name}" and not _COUNTED.search(name)), None)
    return f"{inside} is numbered as a block, and blocks get other numbers" if inside else ""


def _forget(config: PreTrainedConfig) -> None:
    """Take out of a configuration what describes multi-token prediction."""
    for key in [key for key in vars(config) if _COUNTED.search(key)]:
        delattr(config, key)
        if getattr(config, key, None):  # the class has a value of its own
            setattr(config, key, 0)
