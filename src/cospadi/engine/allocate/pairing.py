"""Groups that only the calibration text can tell: pairs of weights that look alike to their inputs (GeoPair)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.engine.context import RunContext
from cospadi.engine.plan.grouping import Together, merged
from cospadi.engine.plan.plan import Plan, PlannedGroup, sources_of, uniform_specs
from cospadi.format import GroupShape
from cospadi.methods import get_method
from cospadi.model_view import LinearGroup
from cospadi.recipe import Recipe
from cospadi.runtime.memory import guard_memory
from cospadi.solvers.matching import best_pairs, pair_distances
from cospadi.solvers.whitening import cholesky_whitening


def matched(context: RunContext, plan: Plan) -> list[Together]:
    """The best pairs of all weights of a plan with inputs of one size, wherever they are in the model.

    Weights are compared as their inputs see them, whitened (GeoPair, arXiv 2609.25963); of all ways to form as many
    pairs as possible the one of least total distance is taken.

    Args:
        context: of the run; the device holds all whitened weights of one input size in float32.
        plan: made from shapes alone.

    Returns:
        pairs and what is left over, in model order.
    """
    alone = [
        Together(GroupShape((name,), group.spec.shape.d_in, (d_out,)), sources_of(context.view, [name]))
        for group in plan.groups
        for name, d_out in zip(group.spec.modules, group.spec.shape.d_out, strict=True)
    ]
    order = {name: number for number, name in enumerate(context.view.module_names)}
    alone.sort(key=lambda item: order[item.shape.modules[0]])
    found: list[Together] = []
    sizes = sorted({item.shape.d_in for item in alone})
    for number, size in enumerate(sizes):
        context.progress("plan", number, len(sizes), f"pairs of {size} inputs")
        members = [item for item in alone if item.shape.d_in == size]
        with guard_memory("comparing all weights with each other", "use --device cpu, or --grouping cross_layer"):
            pairs = best_pairs(pair_distances(_whitened(context, members)))
        found += [merged([members[i], members[j]]) for i, j in pairs]
        left = set(range(len(members))) - {index for pair in pairs for index in pair}
        found += [members[i] for i in sorted(left)]
    context.progress("plan", len(sizes), len(sizes))
    return sorted(found, key=lambda item: order[item.shape.modules[0]])


def _whitened(context: RunContext, members: list[Together]) -> list[Tensor]:
    whitened = []
    seen: tuple[LinearGroup, Statistics] | None = None
    for item in members:
        if seen is None or item.sources[0] != seen[0]:
            seen = item.sources[0], context.read(item.sources[0])
        gram = context.gram(item.shape.modules, seen[1].mean_gram, seen[1].loss)
        whitening = cholesky_whitening(gram)
        weight = context.view.weight(item.shape.modules[0]).to(context.device).double()
        whitened.append(whitening.apply(weight).float())
    return whitened


def plans_of_pairs(plan: Plan, recipe: Recipe, together: list[Together]) -> Callable[[int], Plan]:
    """Plans with these groups and equal shares, by bytes.

    Raises:
        BudgetError: from the plan of a size that some group cannot reach.
    """
    method, shapes = get_method(recipe.method), [item.shape for item in together]

    def choose(budget: int) -> Plan:
        keep = min(plan.keep_requested, budget / plan.bytes_before)
        specs = uniform_specs(shapes, method, keep, recipe.options)
        groups = tuple(
            PlannedGroup(item.layer, item.sources, spec, recipe.options)
            for item, spec in zip(together, specs, strict=True)
        )
        return replace(plan, groups=groups)

    return choose
