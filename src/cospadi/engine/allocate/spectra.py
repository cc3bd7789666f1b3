"""Bytes by singular values: pooled (COMPOT, arXiv 2602.15200) or theoretical truncation loss (SVD-LLM V2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cospadi.allocation import pooled_spectra, theoretical_loss, truncation_loss
from cospadi.engine.allocate.by_trials import fixed_bytes
from cospadi.engine.context import RunContext
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.methods import Method, get_method
from cospadi.recipe import Recipe
from cospadi.solvers.whitening import cholesky_whitening

LEAST_POOLED = 0.25
"""Share of the uniform budget that pooled singular values leave every group."""


def by_spectra(context: RunContext, recipe: Recipe, plan: Plan, *, rule: str) -> Callable[[int], Plan]:
    """Budgets from singular values: pooled (COMPOT), or by theoretical truncation loss (SVD-LLM V2).

    Args:
        context: of the run.
        recipe: of the run.
        plan: with equal shares; groups across layers keep theirs.
        rule: ``"pooled"`` or ``"truncation"``.
    """
    groups = [group for group in plan.groups if group.own_input]
    spectra = []
    for number, group in enumerate(groups):
        context.progress("plan", number, len(groups), group.spec.name)
        weight = torch.cat([context.view.weight(name).to(context.device).double() for name in group.spec.modules], 1)
        if rule == "truncation":
            found = context.read(group.source)
            gram = context.gram(group.spec.modules, found.mean_gram, found.loss)
            # the published loss is a norm over all calibration tokens, not a mean
            weight = cholesky_whitening(gram * found.tokens).apply(weight)
        spectra.append(torch.linalg.svdvals(weight).cpu().numpy())
    context.progress("plan", len(groups), len(groups))
    sizes = [group.spec.dense_bytes for group in groups]
    costs = [2 * (group.spec.shape.d_in + sum(group.spec.shape.d_out)) for group in groups]
    kinds = ["+".join(name.rsplit(".", 1)[-1] for name in group.spec.modules) for group in groups]
    method = get_method(recipe.method)

    def choose(budget: int) -> Plan:
        room = budget - fixed_bytes(plan)
        share = room / sum(sizes)
        if rule == "pooled":
            budgets = pooled_spectra(spectra, costs, room, dense_bytes=sizes, least_keep=LEAST_POOLED * share)
        else:
            ranks = [int(share * size / cost) for size, cost in zip(sizes, costs, strict=True)]
            losses = [truncation_loss(values, rank) for values, rank in zip(spectra, ranks, strict=True)]
            budgets = theoretical_loss(losses, sizes, kinds, share)
        sized = iter(_sized(groups, budgets, method, recipe.options))
        return replace(plan, groups=tuple(next(sized) if g.own_input else g for g in plan.groups))

    return choose


def _sized(
    groups: Sequence[PlannedGroup], budgets: Sequence[int], method: Method, options: dict[str, Any]
) -> list[PlannedGroup]:
    """Specs within the budgets; what rounding leaves over, or the least size takes too much, the next group gets."""
    sized, spare = [], 0
    for group, budget in zip(groups, budgets, strict=True):
        spec = method.spec(group.spec.shape, budget + spare, options)
        spare += budget - spec.bytes
        sized.append(replace(group, spec=spec))
    return sized
