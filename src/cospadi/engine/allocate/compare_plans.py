"""Which of several whole plans harms the model least.

Harm is measured one group at a time, and adds up while errors are small. Where they are large it does not, and not
alike for all representations: at a seventh of the bytes, pruned weights harm less each by itself and more together
than dictionaries. So plans of different make-up are compared whole, on the tokens on which harm was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cospadi.calibration import Statistics, StatisticsStore
from cospadi.engine.allocate.candidates import Family, Task, solve_trial
from cospadi.engine.allocate.sensitivity import DamageMeter, probe_ids
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.format import GroupSpec
from cospadi.model_view import LinearGroup, ModelView
from cospadi.progress import Progress


def least_harmful(
    view: ModelView,
    plans: Sequence[Plan],
    store: StatisticsStore,
    ids: Tensor,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> int:
    """Solve all plans with few rounds and compare what they do to the model's predictions.

    Args:
        view: of the real model; unchanged.
        plans: of the same model. Groups across layers, which no choice concerns, count as if left alone.
        store: statistics of every layer.
        ids: calibration tokens (sequences, length), a few of which are used.
        seed: of the run.
        device: where to compute.
        dtype: the model's 16-bit float.
        progress: called as progress("plan", done, total, detail).

    Returns:
        index of the plan with the least mean divergence per token.
    """
    layers = len(view.layers)
    with DamageMeter(view, probe_ids(ids), device) as meter:
        for layer in range(layers):
            progress("plan", layer, layers, f"comparing {len(plans)} plans: decoder layer {layer}")
            weights = _layer_weights(view, layer, plans, store, seed, device, dtype)
            if layer == 0:
                meter.layer(layer, weights)
            else:
                meter.layer(layer, (), weights)
        harm = meter.divergences()
    progress("plan", layers, layers)
    return min(range(len(plans)), key=harm.__getitem__)


def _layer_weights(
    view: ModelView,
    layer: int,
    plans: Sequence[Plan],
    store: StatisticsStore,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Of every plan, the weights that one layer's groups stand for; what plans have in common is solved once."""
    solved: dict[GroupSpec, dict[str, Tensor]] = {}
    read: dict[LinearGroup, Statistics] = {}

    def solve(group: PlannedGroup) -> dict[str, Tensor]:
        spec = group.spec
        if spec not in solved:
            if group.source not in read:
                read[group.source] = store.load(group.source)
            weights = [view.weight(name) for name in spec.modules]
            task = Task.of(spec.name, weights, read[group.source], spec.d_out, seed=seed, device=device)
            _, found = solve_trial(task, Family(spec.method, group.options), spec, dtype)
            solved[spec] = dict(zip(spec.modules, torch.split(found, list(spec.d_out), 1), strict=True))
        return solved[spec]

    return [
        {
            name: weight
            for group in plan.groups
            if group.layer == layer and not group.sources
            for name, weight in solve(group).items()
        }
        for plan in plans
    ]
