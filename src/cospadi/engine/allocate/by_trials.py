"""Bytes and representations by trials: least total loss under one budget (`auto`), or ROCKET's capped errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from cospadi.allocation import Candidate, knapsack, smallest_cap
from cospadi.engine.allocate.compare_plans import best_plan
from cospadi.engine.allocate.loss_model import Option, profile
from cospadi.engine.context import RunContext
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.errors import BudgetError
from cospadi.format import GroupSpec, MatrixSpec, Rotation, Spec
from cospadi.methods import get_method
from cospadi.methods.representation import Representation, representations
from cospadi.recipe import Recipe

Predict = Callable[[Representation, Spec], float]


def by_trials(context: RunContext, recipe: Recipe, plan: Plan, *, rule: str) -> Callable[[int], Plan]:
    """One option for every group: least total loss, or least total of ROCKET's errors under its cap.

    Where layers may choose for themselves but every group could also share something between them, both plans are
    compared whole. Groups across layers keep their uniform share.

    Args:
        context: of the run.
        recipe: of the run.
        plan: with equal shares.
        rule: ``"knapsack"`` or ``"rocket"``.
    """
    offered = representations(get_method(recipe.method), recipe.options)
    groups = [group for group in plan.groups if group.own_input]
    found = profile(
        context,
        groups,
        offered,
        plan.keep_requested,
        measure=rule == "knapsack",
        relative=rule == "rocket",
    )

    def choose(budget: int, options: Sequence[Sequence[Option]]) -> Plan:
        table = [[Candidate(option.bytes, option.loss) for option in row] for row in options]
        room = budget - fixed_bytes(plan)
        if sum(min(candidate.bytes for candidate in row) for row in table) > room:
            least = fixed_bytes(plan) + sum(min(r.smallest(item.shape).bytes for r in offered) for item in found)
            raise BudgetError(
                f"{budget:,} bytes are too few for method {recipe.method!r} on this model: the least possible is "
                f"{least:,} (keep {least / plan.bytes_before:.4f})"
            )
        cap = smallest_cap(table, room) if rule == "rocket" else None
        picks = knapsack(table, room, cap=cap)
        chosen = [(item.predict, row[pick]) for item, row, pick in zip(found, options, picks, strict=True)]
        final = iter(spend(chosen, room - sum(option.bytes for _, option in chosen)))
        parts = [settled(g, next(final)) if g.own_input else [g] for g in plan.groups]
        return replace(plan, groups=tuple(part for several in parts for part in several))

    every = partial(choose, options=[item.options for item in found])
    joint = [[o for o in item.options if not any(r.each for r, _ in o.parts)] for item in found]
    if rule != "knapsack" or not all(joint):
        return every
    ways = [every, partial(choose, options=joint)]
    try:
        plans = [way(plan.budget) for way in ways]
    except BudgetError:
        return every
    return every if plans[0] == plans[1] else ways[best_plan(context, plans)]


def fixed_bytes(plan: Plan) -> int:
    """Bytes of the groups across layers, which no rule changes."""
    return sum(group.spec.bytes for group in plan.groups if not group.own_input)


def settled(group: PlannedGroup, option: Option) -> list[PlannedGroup]:
    """What is stored of a group: pieces that chose the same, whatever rows they have, stay together.

    One launch of a kernel serves them then.
    """
    chosen: dict[tuple[int, MatrixSpec, Rotation | None], list[tuple[Representation, GroupSpec]]] = {}
    for item, spec in option.parts:
        if not isinstance(spec, GroupSpec) or spec.dictionary is not None:
            return [PlannedGroup(group.layer, group.sources, spec, item.options)]
        chosen.setdefault((id(item), replace(spec.codes, rows=1), spec.rotation), []).append((item, spec))
    settled = []
    for parts in chosen.values():
        item, specs = parts[0][0], [spec for _, spec in parts]
        modules = tuple(name for spec in specs for name in spec.modules)
        d_out = tuple(size for spec in specs for size in spec.d_out)
        codes = replace(specs[0].codes, rows=sum(d_out))
        spec = replace(specs[0], modules=modules, d_out=d_out, codes=codes, method=item.method)
        settled.append(PlannedGroup(group.layer, group.sources, spec, item.options))
    return settled


def spend(chosen: Sequence[tuple[Predict, Option]], left: int) -> list[Option]:
    """Hand out what the grid of candidates leaves over, each time to the group that gains most from it.

    Args:
        chosen: of every group, its predicted loss of a spec and the option so far.
        left: bytes.
    """
    options = [option for _, option in chosen]
    open_ = set(range(len(options)))
    while left > 0 and open_:
        best: tuple[float, int, Option] | None = None
        for index in sorted(open_):
            predict, option = chosen[index][0], options[index]
            larger = grown(option, left)
            if larger is None:
                open_.discard(index)
                continue
            item = option.parts[0][0]
            richer = Option(((item, larger),), predict(item, larger))
            gain = option.loss - richer.loss
            if best is None or gain > best[0]:
                best = gain, index, richer
        if best is None or best[0] <= 0:
            return options
        left -= best[2].bytes - options[best[1]].bytes
        options[best[1]] = best[2]
        open_.discard(best[1])
    return options


def grown(option: Option, extra: int) -> Spec | None:
    """The largest spec of an option's representation with at most `extra` more bytes, if it is larger at all."""
    item, spec = option.parts[0]
    if item.fixed or len(option.parts) > 1:
        return None
    shape = spec.shape
    room = min(spec.bytes + extra, int(item.most * shape.dense_bytes))
    if room <= spec.bytes:
        return None
    larger = get_method(item.method).spec(shape, room, item.options)
    return larger if larger.bytes > spec.bytes else None
