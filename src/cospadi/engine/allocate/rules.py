"""The plan after calibration: who gets how many bytes, once the statistics of every layer are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cospadi.allocation import Candidate, knapsack, pooled_spectra, smallest_cap, theoretical_loss, truncation_loss
from cospadi.calibration import StatisticsStore
from cospadi.checkpoint import storage_dtype
from cospadi.engine.allocate.candidates import Family
from cospadi.engine.allocate.compare_plans import least_harmful
from cospadi.engine.allocate.loss_model import Option, profile
from cospadi.engine.allocate.pairing import matched, plans_of_pairs
from cospadi.engine.journal import Journal
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.engine.plan.target import side_bytes
from cospadi.errors import BudgetError
from cospadi.format import GroupSpec, MatrixSpec
from cospadi.io import write_durably
from cospadi.methods import GroupShape, Method, get_method
from cospadi.methods.auto import choices
from cospadi.model_view import ModelView
from cospadi.progress import Progress
from cospadi.recipe import Recipe
from cospadi.solvers.whitening import cholesky_whitening

PUBLISHED = {
    "auto": "knapsack",
    "compot": "pooled",
    "rocket": "rocket",
    "svd_llm_v2": "truncation",
}
"""Allocation of the methods that bring their own; all others: uniform."""
LEAST_POOLED = 0.25
"""Share of the uniform budget that pooled singular values leave every group."""


def allocation_rule(recipe: Recipe) -> str:
    """Name of the recipe's allocation: the one asked for, else the method's own."""
    return recipe.allocation or PUBLISHED.get(recipe.method, "uniform")


def final_plan(
    view: ModelView,
    recipe: Recipe,
    plan: Plan,
    store: StatisticsStore,
    device: torch.device,
    journal: Journal,
    progress: Progress,
    ids: Tensor | None = None,
    fisher: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan that is carried out. It is kept in the journal, so a resumed run does not compute it again.

    Args:
        view: of the real model.
        recipe: of the run.
        plan: made from shapes alone.
        store: statistics of every layer.
        device: where to compute.
        journal: for what must survive an interruption.
        progress: called as progress(phase, done, total, detail="", error=None).
        ids: calibration tokens (sequences, length), on a few of which harm is measured. Without them a knapsack is
            not possible and the plan stays as it is: errors that are only counted, by energy or relative to it,
            allocate worse than equal shares.
        fisher: mean squared gradient of every weight by name, for methods that need it.

    Raises:
        BudgetError: if the budget is below the least possible size.
    """
    rule = allocation_rule(recipe)
    equal = rule == "uniform" or (rule == "knapsack" and ids is None)
    pairs = (recipe.grouping or get_method(recipe.method).grouping) == "pairs"
    if equal and not pairs:
        return plan
    path = journal.folder / "plan.json"
    asked = {"rule": rule, "keep": plan.keep_requested, "recipe": recipe.model_dump(mode="json", exclude={"device"})}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return _read(kept["groups"], plan, view)
    equally = plans_of_pairs(plan, recipe, matched(view, plan, store, device, progress)) if pairs else None
    start = equally(budget_of(plan)) if equally else plan
    if equal or not any(own_input(group) for group in start.groups):
        choose: Choose = equally or (lambda _: plan)
    elif rule in ("pooled", "truncation"):
        choose = _by_spectra(view, recipe, start, store, device, progress, rule)
    else:
        choose = _by_trials(view, recipe, start, store, device, progress, ids, rule, fisher or {})
    decided = choose(budget_of(plan))
    if recipe.target_size is not None:
        decided = _within_target(decided, choose, plan, view)
    written = [{"spec": g.spec.to_dict(), "options": g.options} for g in decided.groups]
    write_durably(path, json.dumps({"asked": asked, "groups": written}, indent=1).encode())
    return decided


Choose = Callable[[int], Plan]
"""A plan within a number of bytes."""


def _within_target(decided: Plan, choose: Choose, plan: Plan, view: ModelView) -> Plan:
    """A smaller plan, where another mixture of representations needs more beside the tensors than was reckoned with."""

    def beside(of: Plan) -> int:
        return side_bytes(view.model, [group.spec for group in of.groups], of.other_bytes + of.bytes_after)

    whole, reckoned = budget_of(plan), beside(plan)
    budget = whole
    while (over := decided.bytes_after + beside(decided) - whole - reckoned) > 0:
        budget = min(budget, decided.bytes_after) - over
        decided = choose(budget)
    return decided


def budget_of(plan: Plan) -> int:
    """Bytes that all groups may take together."""
    return int(plan.keep_requested * plan.bytes_before)


def shape_of(group: PlannedGroup) -> GroupShape:
    """Names and sizes of a planned group."""
    return GroupShape(group.spec.modules, group.spec.d_in, group.spec.d_out)


def own_input(group: PlannedGroup) -> bool:
    """Whether all of a group's modules read one input; groups across layers keep their uniform share."""
    return not group.sources


def families(method: Method, options: dict[str, Any]) -> list[Family]:
    """Ways to store a group: the method's own, or all that `auto` may choose from."""
    if method.name != "auto":
        return [Family(method.name, options)]
    bits = method.check(options)["bits"]
    return [Family(**asdict(choice)) for choice in choices(bits)]


def _read(rows: list[dict[str, Any]], plan: Plan, view: ModelView) -> Plan:
    sources = {name: group for group in view.groups for name in group.modules}
    groups = []
    for row in rows:
        spec = GroupSpec.from_dict(row["spec"])
        read = tuple(sources[name] for name in spec.modules)
        differ = read if len(set(read)) > 1 else ()
        groups.append(PlannedGroup(read[0].layer, read[0], spec, row["options"], differ))
    return replace(plan, groups=tuple(groups))


def _by_trials(
    view: ModelView,
    recipe: Recipe,
    plan: Plan,
    store: StatisticsStore,
    device: torch.device,
    progress: Progress,
    ids: Tensor | None,
    rule: str,
    fisher: Mapping[str, Tensor],
) -> Choose:
    """One option for every group: least total harm, or least total of ROCKET's errors under its cap.

    Where layers may choose for themselves but every group could also share something between them, both plans are
    compared whole.
    """
    known = families(get_method(recipe.method), recipe.options)
    found = profile(
        view,
        [group for group in plan.groups if own_input(group)],
        known,
        plan.keep_requested,
        store,
        ids=ids if rule == "knapsack" else None,
        relative=rule == "rocket",
        seed=recipe.seed,
        device=device,
        dtype=storage_dtype(view.model),
        progress=progress,
        fisher=fisher,
    )

    def choose(budget: int, options: Sequence[Sequence[Option]]) -> Plan:
        table = [[Candidate(option.bytes, option.loss) for option in row] for row in options]
        room = budget - _fixed_bytes(plan)
        if sum(min(candidate.bytes for candidate in row) for row in table) > room:
            least = _fixed_bytes(plan) + sum(min(f.smallest(item.shape).bytes for f in known) for item in found)
            raise BudgetError(
                f"{budget:,} bytes are too few for method {recipe.method!r} on this model: the least possible is "
                f"{least:,} (keep {least / plan.bytes_before:.4f})"
            )
        cap = smallest_cap(table, room) if rule == "rocket" else None
        picks = knapsack(table, room, cap=cap)
        chosen = [(item.predict, row[pick]) for item, row, pick in zip(found, options, picks, strict=True)]
        final = iter(spend(chosen, room - sum(option.bytes for _, option in chosen)))
        settled = [_settled(g, next(final)) if own_input(g) else [g] for g in plan.groups]
        return replace(plan, groups=tuple(part for parts in settled for part in parts))

    every = partial(choose, options=[item.options for item in found])
    shared = [[o for o in item.options if not any(family.each for family, _ in o.parts)] for item in found]
    if ids is None or rule != "knapsack" or not all(shared):
        return every
    ways: list[Choose] = [every, partial(choose, options=shared)]
    try:
        plans = [way(budget_of(plan)) for way in ways]
    except BudgetError:
        return every
    if plans[0] == plans[1]:
        return every
    dtype = storage_dtype(view.model)
    return ways[least_harmful(view, plans, store, ids, seed=recipe.seed, device=device, dtype=dtype, progress=progress)]


def _fixed_bytes(plan: Plan) -> int:
    return sum(group.spec.bytes for group in plan.groups if not own_input(group))


def _settled(group: PlannedGroup, option: Option) -> list[PlannedGroup]:
    """What is stored of a group: pieces that chose the same, whatever rows they have, stay together.

    One launch of a kernel serves them then.
    """
    chosen: dict[tuple[int, MatrixSpec], list[tuple[Family, GroupSpec]]] = {}
    for family, spec in option.parts:
        chosen.setdefault((id(family), replace(spec.codes, rows=1)), []).append((family, spec))
    settled = []
    for parts in chosen.values():
        family, specs = parts[0][0], [spec for _, spec in parts]
        modules = tuple(name for spec in specs for name in spec.modules)
        d_out = tuple(size for spec in specs for size in spec.d_out)
        codes = replace(specs[0].codes, rows=sum(d_out))
        spec = replace(specs[0], modules=modules, d_out=d_out, codes=codes, method=family.method)
        settled.append(PlannedGroup(group.layer, group.source, spec, family.options))
    return settled


Predict = Callable[[Family, GroupSpec], float]


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
            family = option.parts[0][0]
            richer = Option(((family, larger),), predict(family, larger))
            gain = option.loss - richer.loss
            if best is None or gain > best[0]:
                best = gain, index, richer
        if best is None or best[0] <= 0:
            return options
        left -= best[2].bytes - options[best[1]].bytes
        options[best[1]] = best[2]
        open_.discard(best[1])
    return options


def grown(option: Option, extra: int) -> GroupSpec | None:
    """The largest spec of an option's family with at most `extra` more bytes, if it is larger at all."""
    family, spec = option.parts[0]
    if family.fixed or len(option.parts) > 1:
        return None
    shape = GroupShape(spec.modules, spec.d_in, spec.d_out)
    room = min(spec.bytes + extra, int(family.most * shape.dense_bytes))
    if room <= spec.bytes:
        return None
    larger = get_method(family.method).spec(shape, room, family.options)
    return larger if larger.bytes > spec.bytes else None


def _by_spectra(
    view: ModelView,
    recipe: Recipe,
    plan: Plan,
    store: StatisticsStore,
    device: torch.device,
    progress: Progress,
    rule: str,
) -> Choose:
    """Budgets from singular values: pooled (COMPOT), or by theoretical truncation loss (SVD-LLM V2)."""
    groups = [group for group in plan.groups if own_input(group)]
    spectra = []
    for number, group in enumerate(groups):
        progress("plan", number, len(groups), group.spec.name)
        weight = torch.cat([view.weight(name).to(device).double() for name in group.spec.modules], 1)
        if rule == "truncation":
            gram = store.load(group.source).mean_gram.to(device)
            weight = cholesky_whitening(gram).apply(weight)
        spectra.append(torch.linalg.svdvals(weight).cpu().numpy())
    progress("plan", len(groups), len(groups))
    sizes = [group.spec.dense_bytes for group in groups]
    costs = [2 * (group.spec.d_in + sum(group.spec.d_out)) for group in groups]
    kinds = [tuple(name.rsplit(".", 1)[-1] for name in group.spec.modules) for group in groups]
    method = get_method(recipe.method)

    def choose(budget: int) -> Plan:
        room = budget - _fixed_bytes(plan)
        share = room / sum(sizes)
        if rule == "pooled":
            budgets = pooled_spectra(spectra, costs, room, dense_bytes=sizes, least_keep=LEAST_POOLED * share)
        else:
            ranks = [int(share * size / cost) for size, cost in zip(sizes, costs, strict=True)]
            losses = [truncation_loss(values, rank) for values, rank in zip(spectra, ranks, strict=True)]
            budgets = theoretical_loss(losses, sizes, kinds, share)
        sized = iter(_sized(groups, budgets, method, recipe.options))
        return replace(plan, groups=tuple(next(sized) if own_input(g) else g for g in plan.groups))

    return choose


def _sized(
    groups: Sequence[PlannedGroup], budgets: Sequence[int], method: Method, options: dict[str, Any]
) -> list[PlannedGroup]:
    """Specs within the budgets; what rounding leaves over, or the least size takes too much, the next group gets."""
    sized, spare = [], 0
    for group, budget in zip(groups, budgets, strict=True):
        spec = method.spec(shape_of(group), budget + spare, options)
        spare += budget - spec.bytes
        sized.append(replace(group, spec=replace(spec, method=method.name)))
    return sized
