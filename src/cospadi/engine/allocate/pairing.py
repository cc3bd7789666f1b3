"""Groups that only the calibration text can tell: pairs of weights that look alike to their inputs (GeoPair)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cospadi.calibration import StatisticsStore
from cospadi.engine.plan.grouping import Together, merged
from cospadi.engine.plan.plan import Plan, PlannedGroup, uniform_specs
from cospadi.methods import GroupShape, get_method
from cospadi.model_view import ModelView
from cospadi.progress import Progress
from cospadi.recipe import Recipe
from cospadi.runtime.memory import guard_memory
from cospadi.solvers.matching import best_pairs, pair_distances
from cospadi.solvers.whitening import cholesky_whitening


def matched(
    view: ModelView, plan: Plan, store: StatisticsStore, device: torch.device, progress: Progress
) -> list[Together]:
    """The best pairs of all weights of a plan with inputs of one size, wherever they are in the model.

    Weights are compared as their inputs see them, whitened (GeoPair, arXiv 2609.25963); of all ways to form as many
    pairs as possible the one of least total distance is taken.

    Args:
        view: of the real model.
        plan: made from shapes alone.
        store: statistics of every layer.
        device: where to compute; it holds all whitened weights of one input size in float32.
        progress: called as progress("plan", done, total, detail).

    Returns:
        pairs and what is left over, in model order.
    """
    alone = [
        Together(GroupShape((name,), group.spec.d_in, (d_out,)), source)
        for group in plan.groups
        for name, d_out, source in zip(
            group.spec.modules,
            group.spec.d_out,
            group.sources or (group.source,) * len(group.spec.modules),
            strict=True,
        )
    ]
    order = {name: number for number, name in enumerate(view.module_names)}
    alone.sort(key=lambda item: order[item.shape.modules[0]])
    found: list[Together] = []
    sizes = sorted({item.shape.d_in for item in alone})
    for number, size in enumerate(sizes):
        progress("plan", number, len(sizes), f"pairs of {size} inputs")
        members = [item for item in alone if item.shape.d_in == size]
        with guard_memory("comparing all weights with each other", "use --device cpu, or --grouping cross_layer"):
            pairs = best_pairs(pair_distances(_whitened(view, members, store, device)))
        found += [merged([members[i], members[j]]) for i, j in pairs]
        left = set(range(len(members))) - {index for pair in pairs for index in pair}
        found += [members[i] for i in sorted(left)]
    progress("plan", len(sizes), len(sizes))
    return sorted(found, key=lambda item: order[item.shape.modules[0]])


def _whitened(view: ModelView, members: list[Together], store: StatisticsStore, device: torch.device) -> list[Tensor]:
    whitened, last, whitening = [], None, None
    for item in members:
        if whitening is None or item.source != last:
            last, whitening = item.source, cholesky_whitening(store.load(item.source).mean_gram.to(device))
        weight = view.weight(item.shape.modules[0]).to(device).double()
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
            PlannedGroup(item.source.layer, item.source, replace(s, method=method.name), recipe.options, item.sources)
            for item, s in zip(together, specs, strict=True)
        )
        return replace(plan, groups=groups)

    return choose
