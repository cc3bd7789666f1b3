"""Groups of layers, numbers of shared atoms and ranks under one budget (MASA, arXiv 2508.04581)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cospadi.calibration.logit_lens import logit_lens
from cospadi.engine.context import RunContext
from cospadi.engine.plan.plan import Plan, planned, sources_of
from cospadi.format import GroupShape
from cospadi.masa.retrofit.atoms import Layers, MasaOptions, search
from cospadi.masa.retrofit.layer_groups import divergences
from cospadi.methods import get_method
from cospadi.recipe import Recipe
from cospadi.runtime.devices import widened


def by_atoms(context: RunContext, recipe: Recipe, plan: Plan) -> Callable[[int], Plan]:
    """Groups of consecutive layers by the logit lens, then atoms and ranks of least whitened error.

    Args:
        context: of the run.
        recipe: of the run.
        plan: its groups hold all layers of a projection.
    """
    view, device = context.view, context.device
    context.progress("plan", 0, 1, "logit lens")
    with widened(view.model, device):
        distances = divergences(logit_lens(view, context.ids, device))
    layers = {name: group.layer for group in view.groups for name in group.modules}
    options = MasaOptions(**get_method(recipe.method).check(recipe.options))

    def data(part: GroupShape) -> Layers:
        inputs = {source: context.read(source) for source in sources_of(view, part.modules)}
        of_each = [(name, inputs[sources_of(view, [name])[0]]) for name in part.modules]
        grams = [context.gram([name], found.mean_gram, found.loss) for name, found in of_each]
        return [view.weight(name).to(device).double() for name in part.modules], grams

    def choose(budget: int) -> Plan:
        specs = search(
            [group.spec.shape for group in plan.groups],
            layers.__getitem__,
            distances,
            data,
            budget,
            options,
            lambda done, total, name: context.progress("plan", done, total, name),
        )
        return replace(plan, groups=tuple(planned(view, spec, recipe.options) for spec in specs))

    return choose
