"""Which of several whole plans loses the least quality.

Sensitivity is measured one group at a time, and losses add up while errors are small. Where errors are large they do
not, and not alike for all representations: at a seventh of the bytes, pruned weights lose less each by itself and more
together than dictionaries. So plans of different make-up are compared whole, on the tokens of the sensitivity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.engine.allocate.candidates import solve_trial, task_of
from cospadi.engine.allocate.sensitivity import SensitivityMeter, probe_ids
from cospadi.engine.context import RunContext
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.format import Spec
from cospadi.methods.representation import Representation
from cospadi.model_view import LinearGroup


def best_plan(context: RunContext, plans: Sequence[Plan]) -> int:
    """Solve all plans with few rounds and compare what they do to the model's predictions.

    Args:
        context: of the run; the model is unchanged afterwards.
        plans: of the same model. Groups across layers, which no choice concerns, count as if left alone.

    Returns:
        index of the plan with the least mean divergence per token.
    """
    layers = len(context.view.layers)
    with SensitivityMeter(context.view, probe_ids(context.ids), context.device) as meter:
        for layer in range(layers):
            context.progress("plan", layer, layers, f"comparing {len(plans)} plans: decoder layer {layer}")
            weights = _layer_weights(context, layer, plans)
            if layer == 0:
                meter.layer(layer, weights)
            else:
                meter.layer(layer, (), weights)
        losses = meter.divergences()
    context.progress("plan", layers, layers)
    return min(range(len(plans)), key=losses.__getitem__)


def _layer_weights(context: RunContext, layer: int, plans: Sequence[Plan]) -> list[dict[str, Tensor]]:
    """Of every plan, the weights that one layer's groups stand for; what plans have in common is solved once."""
    solved: dict[Spec, dict[str, Tensor]] = {}
    read: dict[LinearGroup, Statistics] = {}

    def solve(group: PlannedGroup) -> dict[str, Tensor]:
        spec = group.spec
        if spec not in solved:
            if group.source not in read:
                read[group.source] = context.read(group.source)
            task = task_of(context, spec, read[group.source], spec.shape.d_out)
            _, found = solve_trial(task, Representation(spec.method, group.options), spec)
            solved[spec] = dict(zip(spec.modules, torch.split(found, list(spec.shape.d_out), 1), strict=True))
        return solved[spec]

    return [
        {
            name: weight
            for group in plan.groups
            if group.layer == layer and group.own_input
            for name, weight in solve(group).items()
        }
        for plan in plans
    ]
