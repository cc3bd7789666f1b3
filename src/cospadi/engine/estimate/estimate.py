"""What a run will produce and cost, from the configuration alone: sizes, layer table, memory, seconds by phase.

Times should be right within a factor of two. Constants were fitted to whole runs of `pursuit` and `cospadi` on two CPU
cores and on an H200, and to single groups of the other methods on one CPU thread; the cost of tuning is counted, not
fitted. Which representations `auto` drops on the way is taken from runs on trained models. Where a method's work
depends on the weights in any other way, no time is stated.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cospadi.calibration import sequences_per_batch
from cospadi.calibration.statistics import CHUNK_TOKENS
from cospadi.calibration.token_weights import LOGITS, PART_TOKENS
from cospadi.checkpoint.headers import Entry
from cospadi.engine.allocate.rules import allocation_rule, require_loss
from cospadi.engine.estimate.planning_work import SOFTMAX, parts, planning_work
from cospadi.engine.estimate.solver_work import solver_work
from cospadi.engine.estimate.speed import START, measure_speed
from cospadi.engine.plan.extra import carried_tensors, without_extra
from cospadi.engine.plan.order import order_of, plain_share, suited
from cospadi.engine.plan.plan import Plan, make_plan
from cospadi.engine.plan.pruning import check_section, prune_skeleton
from cospadi.engine.plan.target import Beside
from cospadi.engine.plan.text import reads_text
from cospadi.engine.rehearsal import rehearse as try_the_end
from cospadi.engine.tune.tuner import EVALUATIONS
from cospadi.errors import RecipeError
from cospadi.format import GroupSpec
from cospadi.methods import get_method
from cospadi.methods.cost import Work
from cospadi.model_view import LinearGroup, ModelView, check_length, config_of, discover, skeleton
from cospadi.options import recipe_from
from cospadi.recipe import Recipe, Refine
from cospadi.runtime.devices import compute_dtype, device_name, parse_device, resolve_device

PROCESS_BYTES = {"cpu": 450_000_000, "cuda": 1_900_000_000}
"""Host memory of Python with torch and transformers alone; on CUDA, with its libraries, what measured runs leave."""

PROBES = 4
"""Learning rates that a refinement usually tries before it settles."""


@dataclass(frozen=True, repr=False)
class Estimate:
    """What `cospadi estimate` prints.

    Attributes:
        model: name.
        architecture: as its configuration says.
        parameters: of the whole model.
        plan: what would be stored.
        memory: peak host bytes by part: ``process``, ``model``, ``hidden_states``, ``working``.
        flops: of all matrix products of the phases that are known.
        seconds: by phase and in ``total``; None where there is no honest guess.
        device: name of the device that the guess is for; None if it is not there.
        removed_bytes: of linear layers in blocks that are pruned first; shares count against the whole.
        notes: warnings.
    """

    model: str
    architecture: str
    parameters: int
    plan: Plan
    memory: dict[str, int]
    flops: float
    seconds: dict[str, float | None]
    device: str | None
    removed_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """Peak host bytes of the whole process."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json` and for the console."""
        plan = self.plan
        before = plan.bytes_before + self.removed_bytes
        return {
            "model": self.model,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "keep_requested": plan.keep_requested * plan.bytes_before / before,
            "keep_actual": plan.bytes_after / before,
            "bytes_before": before,
            "bytes_after": plan.bytes_after,
            "other_bytes": plan.other_bytes,
            "file_bytes_before": before + plan.other_bytes,
            "file_bytes": plan.bytes_after + plan.other_bytes,
            "peak_memory_bytes": self.memory_bytes,
            "memory": self.memory,
            "flops": self.flops,
            "seconds": {key: None if value is None else round(value, 3) for key, value in self.seconds.items()},
            "device": self.device,
            "warnings": self.notes,
            "groups": [group.row() for group in plan.groups],
        }

    def __repr__(self) -> str:
        from cospadi.report.results import estimate_line

        return estimate_line(self.to_dict())

    def _repr_html_(self) -> str:
        from cospadi.report.results import estimate_fragment

        return estimate_fragment(self.to_dict())


def estimate(
    model: object,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    *,
    rehearse: bool = False,
    **options: Any,
) -> Estimate:
    """Sizes, layer table, memory and time, from the configuration alone; see :func:`cospadi.estimate`.

    Args:
        model: local directory, hub id, or a transformers model.
        recipe: a recipe, its keys and values, or the path of one; left out: the defaults.
        rehearse: also save and open a result without content, and look at the headers of the weights that are here.
        **options: see :func:`~cospadi.options.recipe_from`; they override the recipe.

    Raises:
        ModelError: if there is no configuration, or the architecture is not supported.
        BudgetError: if the size cannot be reached, or none is asked for.
        RecipeError: if the method or one of its options does not exist, or is out of range.
        CalibrationError: if the model has no positions for sequences of that length.
    """
    recipe = recipe_from(recipe, options)
    get_method(recipe.method).check(recipe.options)
    recipe.require_budget()
    recipe = suited(recipe, parse_device(recipe.device))
    if recipe.prune is not None:
        check_section(recipe.prune)
    config, name = config_of(model)
    empty = skeleton(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if reads_text(recipe):
            check_length(empty, recipe.calibration.seq_len)
    require_loss(empty, recipe)
    view = discover(empty)
    parameters, removed, asked = empty.num_parameters(), 0, recipe
    extra: dict[str, Entry] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        if rehearse:
            extra = carried_tensors(model, view, recipe)
            recipe = without_extra(recipe, extra)
    if recipe.prune is not None:
        view, recipe, removed = prune_skeleton(view, recipe)
    plan = make_plan(view, recipe, Beside(indexed=bool(extra)))
    if rehearse:
        try_the_end(view, plan, None, extra)
    try:
        device: torch.device | None = resolve_device(recipe.device)
    except RecipeError:  # sizes are of use on a machine without the one that will do the work, too
        device = None
    work = phases(view, plan, asked)
    return Estimate(
        model=name,
        architecture=(config.architectures or [type(empty).__name__])[0],
        parameters=parameters,
        plan=plan,
        memory=host_memory(view, plan, recipe, device),
        flops=sum(part.operations for part in work.values() if part is not None),
        seconds=seconds(work, view, device),
        device=None if device is None else device_name(device),
        removed_bytes=removed,
        notes=[str(w.message) for w in (*caught, *told) if w.category is UserWarning],
    )


def phases(view: ModelView, plan: Plan, recipe: Recipe) -> dict[str, Work | None]:
    """Work by phase, named as in reports; None: unknown.

    Args:
        view: of a real or a meta model, with all its linear groups.
        plan: what will be stored.
        recipe: of the run.
    """
    found: dict[str, Work | None] = {"calibrate": calibration_work(view, plan, recipe)} if reads_text(recipe) else {}
    if recipe.prune is not None:  # what it looks at is the pruning method's affair
        found = {"prune": None, **found}
    if allocation_rule(recipe) != "uniform":
        found["allocate"] = planning_work(view, plan, recipe)
    solves = [solver_work(part, g.options) for g in plan.groups for part in parts(g.spec)]
    known = [work for work in solves if work is not None]
    found["factorise"] = sum(known, Work()) if len(known) == len(solves) else None
    if order_of(recipe, plan).layers:
        following = streams_work(view, plan, recipe)
        found["factorise"] = None if found["factorise"] is None else found["factorise"] + following
    if recipe.refine is not None:
        found["refine"] = refine_work(view, plan, recipe, recipe.refine)
    return found


def seconds(work: dict[str, Work | None], view: ModelView, device: torch.device | None) -> dict[str, float | None]:
    """Seconds by phase on this machine, and in total where all are known.

    Args:
        work: by phase.
        view: of the model, for its float type.
        device: where; None: not known.
    """
    if device is None:
        return {**dict.fromkeys(work), "total": None}
    speed = measure_speed(device, view.model.dtype)
    found = {name: None if one is None else START[device.type] + speed.seconds(one) for name, one in work.items()}
    known = [value for value in found.values() if value is not None]
    return {**found, "total": sum(known) if len(known) == len(found) else None}


def forward_work(view: ModelView, tokens: int, length: int) -> Work:
    """All decoder layers once over some text, without the Grams.

    Args:
        view: of a real or a meta model.
        tokens: of the text.
        length: tokens in a sequence.
    """
    layers, width = len(view.layers), view.hidden_width
    linear = sum(2.0 * g.d_in * sum(g.d_out) for g in view.groups)
    attention = 2.0 * length * width * layers  # queries by keys and weights by values, half of them masked
    batches = max(1.0, tokens / (sequences_per_batch(length) * length))
    # hidden states wait on the host: there and back for every layer, at two bytes a number
    return Work(forward=tokens * (linear + attention), kernels=30 * layers * batches, transferred=4.0 * tokens * width)


def gram_work(d_in: int, tokens: int) -> Work:
    """The Gram of one input: float32 products over few tokens, summed in float64."""
    chunks = max(1.0, tokens / CHUNK_TOKENS)
    return Work(products=2.0 * tokens * d_in**2, moved=24.0 * d_in**2 * chunks, kernels=6 * chunks)


def calibration_work(view: ModelView, plan: Plan, recipe: Recipe) -> Work:
    """The forward pass, a Gram for every input that a compressed layer reads, and gradients where a method needs them.

    Args:
        view: of a real or a meta model.
        plan: what will be stored.
        recipe: calibration text and method.
    """
    once = forward_work(view, _tokens(recipe), recipe.calibration.seq_len)
    gradients = 3 * once if "fisher" in get_method(recipe.method).needs else Work()
    if plain_share(recipe) < 1:
        gradients = gradients + weights_work(view, recipe)
    return once + grams_work(view, plan, recipe) + gradients


def grams_work(view: ModelView, plan: Plan, recipe: Recipe) -> Work:
    """A Gram for every input that a compressed layer reads; weighted ones for each of these layers.

    Args:
        view: of a real or a meta model.
        plan: what will be stored.
        recipe: calibration text and kind of Gram.
    """
    sizes = [g.d_in for g in _sources(view, plan) for _ in range(_grams_of(g, recipe))]
    return sum((gram_work(size, _tokens(recipe)) for size in sizes), Work())


def weights_work(view: ModelView, recipe: Recipe) -> Work:
    """Token weights: every layer forward twice and backward once, without gradients of weights; the head both ways.

    Args:
        view: of a real or a meta model.
        recipe: the calibration text.
    """
    logits = _tokens(recipe) * float(getattr(view.model.config.get_text_config(), "vocab_size", 0))
    head = Work(forward=4.0 * logits * view.hidden_width, moved=SOFTMAX * logits)
    return 3 * forward_work(view, _tokens(recipe), recipe.calibration.seq_len) + head


def streams_work(view: ModelView, plan: Plan, recipe: Recipe) -> Work:
    """What following the streams of hidden states takes: targets, compressed outputs, and the error between them.

    With statistics of compressed inputs also each layer once more, and a Gram for every input. With the anchor a part
    of each layer twice, and a Gram and a cross Gram for every input.

    Args:
        view: of a real or a meta model.
        plan: what will be stored.
        recipe: `sequential`, `anchor` and the calibration text.
    """
    once = forward_work(view, _tokens(recipe), recipe.calibration.seq_len)
    if not order_of(recipe, plan).compressed:
        return 3 * once
    sources, grams = _sources(view, plan), grams_work(view, plan, recipe)
    if not recipe.anchor:
        return 4 * once + grams
    twice = len(sources) / max(1, len(view.layers))  # both streams, on average through half of the layer
    cross = sum((gram_work(g.d_in, _tokens(recipe)) for g in sources), Work())
    return (3 + twice) * once + grams + cross


def refine_work(view: ModelView, plan: Plan, recipe: Recipe, options: Refine) -> Work:
    """Adam steps on every layer and on all together (forward, backward, weights composed anew), and held-out errors.

    Args:
        view: of a real or a meta model.
        plan: what will be stored.
        recipe: the calibration text.
        options: of the refinement.
    """
    samples, length = recipe.calibration.samples, recipe.calibration.seq_len
    lengths = [steps for steps in (options.steps, options.output_steps) if steps]
    steps = sum(n + PROBES * min(n, max(EVALUATIONS, n * options.probe)) for n in lengths)
    factored = [spec for spec in plan.specs if isinstance(spec, GroupSpec) and spec.dictionary]
    composed = sum(6.0 * spec.d_in * spec.atoms * spec.codes.rows for spec in factored)
    step = 3 * forward_work(view, min(options.batch, samples) * length, length)
    step = step + Work(products=composed, kernels=100 * len(plan.groups))
    looks = EVALUATIONS * (1 + PROBES) * options.held_out * len(lengths)
    return steps * step + looks * forward_work(view, samples * length, length)


def host_memory(view: ModelView, plan: Plan, recipe: Recipe, device: torch.device | None) -> dict[str, int]:
    """Peak host bytes by part.

    Args:
        view: of a real or a meta model.
        plan: what will be stored.
        recipe: calibration text, if it reads any; sequential runs follow three streams of hidden states.
        device: where the run would work; None: taken for a processor.

    Returns:
        ``process`` (Python and its libraries), ``model`` (its weights, wider where the processor wants them so, and
        the factors), ``hidden_states`` (of all of the text, before one layer), ``working`` (the most that one batch
        with its Grams, or one group's solve, needs).
    """
    device = device or torch.device("cpu")
    weights = plan.bytes_before + plan.other_bytes
    wide = compute_dtype(weights, device)
    item = (wide or view.model.dtype).itemsize
    states = _tokens(recipe) * view.hidden_width
    if order_of(recipe, plan).layers:
        # the original, the compressed and the target stream; errors between two of them are taken in float32
        states *= 3 * item + (8 if item == 4 else 12)
    else:
        states *= item
    layers = {g.layer for g in view.groups}
    grams = max(sum(8 * g.d_in**2 * _grams_of(g, recipe) for g in view.groups if g.layer == layer) for layer in layers)
    length = recipe.calibration.seq_len
    batch = length * min(recipe.calibration.samples, sequences_per_batch(length))
    if not reads_text(recipe):
        grams = batch = states = 0
    widest = max(sum(g.d_out) for g in view.groups)
    activations = batch * (2 * widest + 4 * view.hidden_width) * item
    solve = int(max(get_method(g.spec.method).memory(g.spec) for g in plan.groups))
    square = 24 * max(g.d_in for g in view.groups) ** 2
    working = 2 * grams if device.type == "cuda" else max(activations + 2 * grams, solve + square)
    if plain_share(recipe) < 1:  # the inputs of all layers for a part of the text, and logits with their gradients
        part = length * min(recipe.calibration.samples, sequences_per_batch(length, PART_TOKENS))
        states = max(states, part * view.hidden_width * item * (1 + len(view.layers)))
        vocabulary = int(getattr(view.model.config.get_text_config(), "vocab_size", 0))
        logits = min(max(LOGITS, length * vocabulary), part * vocabulary)
        working = max(working, 0 if device.type == "cuda" else 12 * logits)
    return {
        "process": PROCESS_BYTES[device.type],
        "model": weights * (3 if wide and view.model.dtype.itemsize == 2 else 1) + plan.bytes_after,
        "hidden_states": states,
        "working": working,
    }


def _grams_of(group: LinearGroup, recipe: Recipe) -> int:
    """Grams of one input: the plain one, and a weighted one for every layer that reads it."""
    return 1 + len(group.modules) * (plain_share(recipe) < 1)


def _tokens(recipe: Recipe) -> int:
    return recipe.calibration.samples * recipe.calibration.seq_len


def _sources(view: ModelView, plan: Plan) -> list[LinearGroup]:
    """The inputs that a compressed layer reads."""
    chosen = {name for g in plan.groups for name in g.spec.modules}
    return [group for group in view.groups if chosen & {*group.modules}]
