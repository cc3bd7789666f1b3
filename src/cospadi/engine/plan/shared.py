"""Runs whose layers share matrix atoms across the model (MASA): plan, search, factors, checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cospadi.calibration import StatisticsStore
from cospadi.checkpoint import storage_dtype
from cospadi.checkpoint.formats.shared import install_shared, replace_shared
from cospadi.engine.factorise import output_error
from cospadi.engine.journal import Journal
from cospadi.errors import BudgetError, RecipeError
from cospadi.io import write_durably
from cospadi.layers.shared_linear import SharedSpec
from cospadi.masa.retrofit.layer_groups import divergences, logit_lens
from cospadi.masa.retrofit.method import TRIED, MasaOptions, masa, masa_plan, projections, rebuild_shared, search
from cospadi.methods import GroupShape, Problem, get_method
from cospadi.model_view import ModelView
from cospadi.progress import Progress
from cospadi.recipe import Recipe
from cospadi.runtime.devices import widened

if TYPE_CHECKING:
    from cospadi.engine.plan.plan import Plan

PLAN = "plan.json"


@dataclass(frozen=True)
class PlannedShared:
    """One projection of several layers, to be stored with shared atoms.

    Attributes:
        layer: index of the first of the decoder layers.
        spec: how it will be stored.
        options: of the method.
    """

    layer: int
    spec: SharedSpec
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def working_bytes(self) -> int:
        """Memory of the search: the matrices, their Grams and the roots of these, in float64."""
        return 8 * len(self.spec.modules) * (2 * self.spec.d_in * self.spec.d_out + 4 * self.spec.d_in**2)

    @property
    def work(self) -> float:
        """Floating-point operations of the search: inner products under every Gram, and the spectra it looks at."""
        layers, d_in, d_out = len(self.spec.modules), self.spec.d_in, self.spec.d_out
        return 2.0 * layers**2 * d_in**2 * d_out + 4.0 * TRIED * layers * d_in * d_out * (d_in + min(d_in, d_out))

    def row(self) -> dict[str, Any]:
        """As it stands in reports."""
        return self.spec.row(self.layer)


def check_shared_recipe(recipe: Recipe, layers: int) -> None:
    """Refuse what does not go with shared atoms.

    Raises:
        RecipeError: naming the field.
    """
    for name, given in (
        ("grouping", recipe.grouping is not None),
        ("allocation", recipe.allocation is not None),
        ("anchor", recipe.anchor),
        ("refine", recipe.refine is not None),
    ):
        if given:
            raise RecipeError(f"{name} does not go with method {recipe.method!r}, which shares atoms across layers")
    groups = MasaOptions(**get_method(recipe.method).check(recipe.options)).groups
    if groups is not None and groups > layers:
        raise RecipeError(f"groups: {groups} groups of {layers} layers are not possible: give 1 to {layers}")


def plan_from_shapes(view: ModelView, recipe: Recipe, modules: Sequence[str], keep: float) -> tuple[PlannedShared, ...]:
    """What shapes alone suggest: every projection of all layers together, with its share of the bytes.

    Raises:
        BudgetError: if the size cannot be reached (names the least possible keep).
        RecipeError: if a field of the recipe does not go with shared atoms, or there are more atoms than layers.
    """
    check_shared_recipe(recipe, len(view.layers))
    atoms = get_method(recipe.method).check(recipe.options)["atoms"]
    shapes = projections(view, modules)
    least = sum(masa_plan(shape, 0, atoms=atoms).bytes for shape in shapes)
    before = sum(shape.dense_bytes for shape in shapes)
    if least > keep * before:
        raise BudgetError(
            f"keep {keep:g} is too small for method {recipe.method!r} on this model: the least possible is "
            f"{ceil(1e4 * least / before) / 1e4:.4f}"
        )
    specs, spare = [], 0.0
    for shape in shapes:
        share = keep * shape.dense_bytes + spare
        specs.append(masa_plan(shape, max(0, int(share)), atoms=atoms))
        spare = share - specs[-1].bytes
    return planned(specs, view, recipe.options)


def planned(specs: Sequence[SharedSpec], view: ModelView, options: Mapping[str, Any]) -> tuple[PlannedShared, ...]:
    """Specs with the layers they begin in."""
    layers = {name: group.layer for group in view.groups for name in group.modules}
    return tuple(PlannedShared(layers[spec.modules[0]], spec, dict(options)) for spec in specs)


def final_shared_plan(
    view: ModelView,
    recipe: Recipe,
    plan: Plan,
    store: StatisticsStore,
    device: torch.device,
    journal: Journal,
    progress: Progress,
    ids: Tensor,
) -> Plan:
    """The plan that is carried out. It is kept in the journal, so a resumed run does not compute it again.

    Args:
        view: of the real model.
        recipe: of the run.
        plan: made from shapes alone; its groups hold all layers of a projection.
        store: statistics of every layer.
        device: where to compute.
        journal: for what must survive an interruption.
        progress: called as progress(phase, done, total, detail="", error=None).
        ids: calibration tokens (sequences, length), for the logit lens.

    Raises:
        BudgetError: if the budget is below the least possible size.
        RecipeError: if the groups, or the atoms of one of them, are not possible.
    """
    path = journal.folder / PLAN
    asked = {"keep": plan.keep_requested, "recipe": recipe.model_dump(mode="json", exclude={"device"})}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            specs = [SharedSpec.from_dict(item) for item in kept["groups"]]
            return replace(plan, shared=planned(specs, view, recipe.options))
    progress("plan", 0, 1, "logit lens")
    with widened(view.model, device):
        distances = divergences(logit_lens(view, ids, device))
    shapes = [GroupShape(g.spec.modules, g.spec.d_in, (g.spec.d_out,) * len(g.spec.modules)) for g in plan.shared]
    layers = {name: group.layer for group in view.groups for name in group.modules}
    specs = search(
        shapes,
        layers.__getitem__,
        distances,
        lambda part: problem_of(view, part.modules, store, device),
        int(plan.keep_requested * plan.bytes_before),
        MasaOptions(**get_method(recipe.method).check(recipe.options)),
        partial(progress, "plan"),
    )
    write_durably(path, json.dumps({"asked": asked, "groups": [s.to_dict() for s in specs]}, indent=1).encode())
    return replace(plan, shared=planned(specs, view, recipe.options))


def problem_of(view: ModelView, modules: Sequence[str], store: StatisticsStore, device: torch.device) -> Problem:
    """Weights of some linear layers and the Gram of each one's input."""
    sources = {name: group for group in view.groups for name in group.modules}
    return Problem(
        name=modules[0],
        weights=tuple(view.weight(name).to(device).double() for name in modules),
        grams=tuple(store.load(sources[name]).mean_gram.to(device) for name in modules),
    )


def factorise_shared(
    view: ModelView, spec: SharedSpec, store: StatisticsStore, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Factorise one projection of a group of layers, and measure what was stored.

    Returns:
        tensors on the CPU by ``"{index}.{parameter}"``; ``{"error", "missed", "energy", "seconds"}``: squared output
        error and output energy per token, summed over the layers, and their quotient.
    """
    begun = time.perf_counter()
    problem = problem_of(view, spec.modules, store, device)
    tensors = masa(problem, spec, dtype=storage_dtype(view.model)).tensors()
    missed = energy = 0.0
    for index, weight in enumerate(rebuild_shared(tensors, spec)):
        miss, whole = output_error(problem.weights[index], weight, problem.gram_of(index))
        missed, energy = missed + miss, energy + whole
    info = {"error": missed / energy if energy else 0.0, "missed": missed, "energy": energy}
    return {key: t.cpu() for key, t in tensors.items()}, info | {"seconds": time.perf_counter() - begun}


def install_plan(model: PreTrainedModel, plan: Plan, journal: Journal) -> list[SharedSpec]:
    """Put the finished groups of a run into its model.

    Returns:
        the specs, for saving.
    """
    specs = [group.spec for group in plan.shared]
    replace_shared(model, specs)
    for index, spec in enumerate(specs):
        with journal.checked(index):
            install_shared(model, spec, journal.read(index)[0])
    return specs


def shared_weights(plan: Plan, journal: Journal, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that the finished groups of a run stand for, as ``nn.Linear`` holds them, by parameter name."""
    found: dict[str, Tensor] = {}
    for index, group in enumerate(plan.shared):
        tensors = {key: tensor.to(device) for key, tensor in journal.read(index)[0].items()}
        weights = rebuild_shared(tensors, group.spec)
        found |= {f"{name}.weight": w.T.to(dtype) for name, w in zip(group.spec.modules, weights, strict=True)}
    return found
