"""The plan: who gets how many bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from transformers import PreTrainedModel

from cospadi.engine.plan.grouping import arranged
from cospadi.engine.plan.selection import chosen_modules, narrowed, restricted
from cospadi.engine.plan.target import NOTHING_MORE, Beside, side_bytes
from cospadi.errors import BudgetError, RecipeError
from cospadi.format import GroupShape, Spec
from cospadi.methods import Method, get_method, refuse_decided
from cospadi.model_view import LinearGroup, ModelView
from cospadi.quantities import parse_size
from cospadi.recipe import Recipe


@dataclass(frozen=True)
class PlannedGroup:
    """One group to factorise.

    Attributes:
        layer: index of its (first) decoder layer.
        sources: the layers that read the same input: one set for all modules of the group, or one for each.
        spec: how it will be stored; `spec.method` solves it.
        options: of that method.
    """

    layer: int
    sources: tuple[LinearGroup, ...]
    spec: Spec
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> LinearGroup:
        """The layers that read the first module's input."""
        return self.sources[0]

    @property
    def own_input(self) -> bool:
        """Whether all modules read one input."""
        return len(self.sources) == 1

    def row(self) -> dict[str, Any]:
        """As it stands in reports."""
        return self.spec.row(self.layer)


@dataclass(frozen=True)
class Plan:
    """What will be stored.

    Attributes:
        groups: in model order.
        keep_requested: share of bytes asked for.
        other_bytes: bytes of everything that is left alone (embeddings, norms, head).
        beside: what the checkpoint will hold beside the tensors of the model.
    """

    groups: tuple[PlannedGroup, ...]
    keep_requested: float
    other_bytes: int
    beside: Beside = field(default=NOTHING_MORE, compare=False, repr=False)

    @property
    def bytes_before(self) -> int:
        """Bytes of the compressed layers at 16 bits a weight."""
        return sum(g.spec.dense_bytes for g in self.groups)

    @property
    def bytes_after(self) -> int:
        """Bytes of all factored tensors."""
        return sum(g.spec.bytes for g in self.groups)

    @property
    def keep_actual(self) -> float:
        """bytes_after / bytes_before."""
        return self.bytes_after / self.bytes_before

    @property
    def budget(self) -> int:
        """Bytes that all groups may take together."""
        return int(self.keep_requested * self.bytes_before)

    @property
    def specs(self) -> list[Spec]:
        """Of all groups."""
        return [group.spec for group in self.groups]


def sources_of(view: ModelView, modules: Sequence[str]) -> tuple[LinearGroup, ...]:
    """The layers that read the same input: one set where all modules are in it, else one for each module."""
    by_name = {name: group for group in view.groups for name in group.modules}
    read = tuple(by_name[name] for name in modules)
    return read if len(set(read)) > 1 else read[:1]


def planned(view: ModelView, spec: Spec, options: dict[str, Any]) -> PlannedGroup:
    """A spec as a group of the plan."""
    sources = sources_of(view, spec.modules)
    return PlannedGroup(sources[0].layer, sources, spec, options)


def uniform_specs(shapes: Sequence[GroupShape], method: Method, keep: float, options: dict[str, Any]) -> list[Spec]:
    """The same share for every group; what rounding leaves over is handed to the next group.

    Raises:
        BudgetError: if some group needs more (names the least possible keep).
    """
    least = least_keep(shapes, method, options)
    if keep < least:
        raise BudgetError(
            f"keep {keep:g} is too small for method {method.name!r} on this model: the least possible is {least:.4f}"
        )
    specs, spare = [], 0.0
    for shape in shapes:
        share = keep * shape.dense_bytes + spare
        spec = method.spec(shape, int(share), options)
        spare = share - spec.bytes
        specs.append(spec)
    return specs


def least_keep(shapes: Sequence[GroupShape], method: Method, options: dict[str, Any]) -> float:
    """The least share that every group can reach, rounded up to four digits.

    Raises:
        RecipeError: if the method cannot be planned with these options.
    """
    try:
        least = max(method.least(shape, options).bytes / shape.dense_bytes for shape in shapes)
    except (ValueError, ArithmeticError) as error:
        raise RecipeError(f"method {method.name!r} cannot work with these options: {error}") from None
    return ceil(1e4 * least) / 1e4


def other_bytes(model: PreTrainedModel, groups: Sequence[LinearGroup]) -> int:
    """Bytes of the parameters outside the compressed weights, in the model's dtype; tied ones counted once."""
    inside = {f"{name}.weight" for group in groups for name in group.modules}
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in inside)


def target_keep(target: int, before: int, others: int) -> float:
    """The share of the compressed layers' bytes that is left for them within a size of all files.

    Args:
        target: bytes of all files.
        before: bytes of the compressed layers at 16 bits a weight.
        others: bytes of everything else.

    Raises:
        BudgetError: if nothing is left, or nothing needs to be done.
    """
    if target <= others:
        raise BudgetError(
            f"target size {target:,} bytes is below what is left alone: embeddings, norms, head, configuration and "
            f"tokenizer take {others:,} bytes"
        )
    if target >= others + before:
        raise BudgetError(f"the model already fits into {target:,} bytes ({others + before:,}): nothing to compress")
    return (target - others) / before


def make_plan(view: ModelView, recipe: Recipe, beside: Beside = NOTHING_MORE) -> Plan:
    """Plan a run on a real or a meta model.

    Args:
        view: of the model.
        recipe: of the run.
        beside: see :class:`Plan`.

    Raises:
        BudgetError: if the size cannot be reached.
        RecipeError: if the method or one of its options does not exist, is out of range, or does not go with another
            field of the recipe.
    """
    recipe.require_budget()
    method = get_method(recipe.method)
    refuse_decided(method, recipe.given("grouping", "allocation", "sequential", "anchor", "refine"))
    modules = chosen_modules(view, recipe)
    view = restricted(view, modules)
    chosen = [narrowed(group, set(modules)) for group in view.groups]
    others = other_bytes(view.model, chosen)
    together = arranged(view.groups, chosen, recipe.grouping or method.grouping, view.layers_name)
    shapes = [item.shape for item in together]
    if recipe.keep is not None:
        keep = recipe.keep
    else:
        target = parse_size(str(recipe.target_size))
        keep = _keep_for_target(target, view, shapes, method, others, recipe.options, beside)
    specs = uniform_specs(shapes, method, keep, recipe.options)
    groups = tuple(
        PlannedGroup(item.sources[0].layer, item.sources, spec, recipe.options)
        for item, spec in zip(together, specs, strict=True)
    )
    return Plan(groups, keep, others, beside)


def _keep_for_target(
    target: int,
    view: ModelView,
    shapes: Sequence[GroupShape],
    method: Method,
    others: int,
    options: dict[str, Any],
    beside: Beside,
) -> float:
    """The share to keep so that all files together fit into `target` bytes."""
    before, least = sum(shape.dense_bytes for shape in shapes), least_keep(shapes, method, options)
    # What stands beside the tensors hardly depends on how much of them is kept: any plan tells it, or the next one.
    specs = uniform_specs(shapes, method, max(least, 0.5), options)
    sides = side_bytes(view.model, specs, target, beside)
    keep = target_keep(target, before, others + sides)
    while keep >= least:
        specs = uniform_specs(shapes, method, keep, options)
        more = side_bytes(view.model, specs, target, beside)
        if more <= sides or others + more + sum(spec.bytes for spec in specs) <= target:
            break
        sides = more
        keep = target_keep(target, before, others + sides)
    if keep < least:
        lowest = others + sides + ceil(least * before)
        raise BudgetError(
            f"target size {target:,} bytes is too small for method {method.name!r} on this model: the least possible "
            f"is {lowest:,}"
        )
    return keep
