"""The plan after calibration: who gets how many bytes, once the statistics of every layer are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from cospadi.engine.allocate.atoms import by_atoms
from cospadi.engine.allocate.by_trials import by_trials
from cospadi.engine.allocate.pairing import matched, plans_of_pairs
from cospadi.engine.allocate.spectra import by_spectra
from cospadi.engine.context import RunContext
from cospadi.engine.journal import Journal
from cospadi.engine.plan.order import plain_share
from cospadi.engine.plan.plan import Plan, planned
from cospadi.engine.plan.target import side_bytes
from cospadi.methods import get_method
from cospadi.model_view import require_predictions
from cospadi.recipe import Recipe

Choose = Callable[[int], Plan]
"""A plan within a number of bytes."""
Rule = Callable[[RunContext, Recipe, Plan], Choose]
"""What is measured once, and turned into a plan for any budget."""

RULES: dict[str, Rule] = {
    "pooled": partial(by_spectra, rule="pooled"),
    "truncation": partial(by_spectra, rule="truncation"),
    "rocket": partial(by_trials, rule="rocket"),
    "knapsack": partial(by_trials, rule="knapsack"),
    "atoms": by_atoms,
}
"""Allocation rules by name; ``uniform`` needs none, the plan made from shapes is that already."""


def allocation_rule(recipe: Recipe) -> str:
    """Name of the recipe's allocation: the one asked for, else the method's own."""
    return recipe.allocation or get_method(recipe.method).allocation


def require_loss(model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse a recipe that needs a language model's loss for a model that has none.

    Args:
        model: real or on ``meta``.
        recipe: of the run.

    Raises:
        ModelError: naming what needs the loss, and what to use instead.
    """
    method = get_method(recipe.method)
    if "fisher" in method.needs:
        require_predictions(model, f"method {method.name!r}", "use another method, such as svd_llm")
    rule = allocation_rule(recipe)
    if rule in ("knapsack", "atoms"):
        what = f"allocation {rule!r}" + ("" if recipe.allocation else f", the default of method {method.name!r},")
        require_predictions(model, what, "use --allocation uniform, or another method such as gptq")
    if plain_share(recipe) < 1:
        require_predictions(model, "gram 'loss'", "use --gram plain")
    if recipe.refine is not None and recipe.refine.output_steps:
        require_predictions(model, "tuning to the predictions", "leave out output_steps")


def final_plan(context: RunContext, recipe: Recipe, plan: Plan, journal: Journal) -> Plan:
    """The plan that is carried out. The journal keeps it, so a resumed run does not compute it again.

    Args:
        context: of the run.
        recipe: of the run.
        plan: made from shapes alone.
        journal: for what must survive an interruption.

    Raises:
        BudgetError: if the budget is below the least possible size.
    """
    rule = allocation_rule(recipe)
    pairs = (recipe.grouping or get_method(recipe.method).grouping) == "pairs"
    if rule == "uniform" and not pairs:
        return plan
    asked = {"rule": rule, "keep": plan.keep_requested, "recipe": recipe.model_dump(mode="json", exclude={"device"})}
    kept = journal.plan(asked)
    if kept is not None:
        return _read(context, plan, kept)
    equally = plans_of_pairs(plan, recipe, matched(context, plan)) if pairs else None
    start = equally(plan.budget) if equally else plan
    if rule == "uniform" or (rule != "atoms" and not any(group.own_input for group in start.groups)):
        choose: Choose = equally or (lambda _: plan)
    else:
        choose = RULES[rule](context, recipe, start)
    decided = choose(plan.budget)
    if recipe.target_size is not None:
        decided = _within_target(decided, choose, plan, context)
    rows = [{"method": g.spec.method, "spec": g.spec.to_dict(), "options": g.options} for g in decided.groups]
    journal.keep_plan(asked, rows)
    return decided


def _read(context: RunContext, plan: Plan, rows: list[dict[str, Any]]) -> Plan:
    groups = []
    for row in rows:
        spec = get_method(row["method"]).spec_type.from_dict(row["spec"]).solved_by(row["method"])
        groups.append(planned(context.view, spec, row["options"]))
    return replace(plan, groups=tuple(groups))


def _within_target(decided: Plan, choose: Choose, plan: Plan, context: RunContext) -> Plan:
    """A smaller plan, where another mixture of representations needs more beside the tensors than was reckoned with."""

    def beside(of: Plan) -> int:
        return side_bytes(context.view.model, of.specs, of.other_bytes + of.bytes_after, plan.beside)

    whole, reckoned = plan.budget, beside(plan)
    budget = whole
    while (over := decided.bytes_after + beside(decided) - whole - reckoned) > 0:
        budget = min(budget, decided.bytes_after) - over
        decided = choose(budget)
    return decided
