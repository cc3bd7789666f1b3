"""The work of choosing a plan after calibration, as far as shapes tell: trials of every group, and their sensitivity.

Which representations are given up on the way only the weights tell. On trained models dictionaries fall behind where
plain integers reach their sizes, and of several patterns one stays, so that is taken for granted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cospadi.engine.allocate.candidates import anchors
from cospadi.engine.allocate.loss_model import MEASURED, REACH_DOWN, piece_spec, roomy, shares
from cospadi.engine.allocate.rules import allocation_rule
from cospadi.engine.allocate.sensitivity import LENGTH, TOKENS
from cospadi.engine.allocate.trials import ANCHORS, COSTLY_ANCHORS, TEACHERS, Kind, Trier, kind_of
from cospadi.engine.estimate.solver_work import solver_work
from cospadi.engine.plan.plan import Plan
from cospadi.format import GroupSpec, Spec
from cospadi.methods import GroupShape, get_method
from cospadi.methods.cost import Work
from cospadi.methods.representation import Representation, representations
from cospadi.model_view import ModelView
from cospadi.recipe import Recipe

SOFTMAX = 40.0
"""Bytes of memory traffic per logit of a variant: softmax, and its divergence from the original's."""

Tried = list[tuple[Representation, list[Spec]]]


def planning_work(view: ModelView, plan: Plan, recipe: Recipe) -> Work | None:
    """What `auto` takes to choose; None for other rules and methods, which solve as much as they find worth trying.

    Args:
        view: of a real or a meta model.
        plan: what shapes suggest.
        recipe: of the run.
    """
    if allocation_rule(recipe) != "knapsack" or recipe.method != "auto":
        return None
    keep, grid = plan.keep_requested, shares(plan.keep_requested, REACH_DOWN)
    trier = Trier(representations(get_method(recipe.method), recipe.options), grid, keep)
    groups = [group for group in plan.groups if group.own_input]
    if not groups:
        return Work()
    work, alike = Work(), Counter[Kind]()
    whole: list[Work] = []  # of representations that a group's layers share, near the target
    for group in groups:
        shape = group.spec.shape
        tried = _tried(trier, shape, known=alike[kind_of(shape)] >= TEACHERS)
        alike[kind_of(shape)] += 1
        work = work + sum((trial_work(item, spec) for item, specs in tried for spec in specs), Work())
        whole += [trial_work(item, specs[-1]) for item, specs in tried if not item.each][:1]
    if roomy(trier.active, groups, grid, keep):
        return work  # every group can have the largest size: sensitivity is not measured
    each = any(item.each for item in trier.offered)
    work = work + sensitivity_work(view, [(g.layer, len(g.spec.modules) if each else 1) for g in groups], recipe)
    if each and len(whole) == len(groups):  # two whole plans are compared; the other one has pieces, solved quickly
        work = work + sum(whole, Work()) + sensitivity_work(view, [(0, 1)], recipe)
    return work


def parts(spec: Spec) -> list[Spec]:
    """What is solved by itself, where shapes suggest to `auto` that layers share nothing: each may choose its own.

    Args:
        spec: of a group.
    """
    if spec.method != "auto" or not isinstance(spec, GroupSpec) or spec.dictionary is not None:
        return [spec]
    return [piece_spec(spec, piece) for piece in range(len(spec.modules))]


def trial_work(item: Representation, spec: Spec) -> Work:
    """One trial with few rounds, as packed, read back and brought to the host.

    Args:
        item: method and options.
        spec: what to reach.
    """
    solved = solver_work(spec.solved_by(item.method), item.hurried)
    weights = spec.dense_bytes // 2
    return (solved or Work()) + Work(transferred=4.0 * weights)


def sensitivity_work(view: ModelView, pieces: Sequence[tuple[int, int]], recipe: Recipe) -> Work:
    """Variants of every piece, and the original, carried through the rest of the model in float32.

    Args:
        view: of a real or a meta model.
        pieces: of every group, its decoder layer and the number of its pieces.
        recipe: calibration text.
    """
    length = min(recipe.calibration.seq_len, LENGTH)
    tokens = min(TOKENS, recipe.calibration.samples * recipe.calibration.seq_len)
    layers, config = len(view.layers), view.model.config.get_text_config()
    width = view.hidden_width
    linear = sum(2.0 * g.d_in * sum(g.d_out) for g in view.groups) / layers
    layer = Work(products=tokens * (linear + 2.0 * length * width), kernels=30, transferred=8.0 * tokens * width)
    logits = tokens * float(getattr(config, "vocab_size", 0))
    head = Work(products=2.0 * logits * width, moved=SOFTMAX * logits, kernels=25 * tokens / length)
    variants = [(at, len(MEASURED) * count) for at, count in pieces]
    passed = layers + sum(count * (layers - at) for at, count in variants)
    return passed * layer + (1 + sum(count for _, count in variants)) * head


def _tried(trier: Trier, shape: GroupShape, *, known: bool) -> Tried:
    """What is solved of a group; `known`: enough groups of its kind came before.

    Representations whose errors are carried over are not solved then, and costly ones are known to be behind or not.
    """
    tried: Tried = []
    taken: list[Spec] = []
    stay: set[str] = set()
    least = float("inf")  # bytes that plain integers reach
    for item in trier.active:
        count = COSTLY_ANCHORS if item.costly else ANCHORS
        specs = anchors(item.specs(shape, trier.grid), int(trier.keep * shape.dense_bytes), count)
        if item.fixed:
            specs = [spec for spec in specs if spec not in taken]
            least = min([least, *(spec.bytes for spec in specs)])
        taken += specs
        if not specs or (known and item.learnt):
            continue
        if item.costly and specs[-1].bytes >= least:
            if known:
                continue
            specs = specs[-1:]  # far behind at the target, it is not tried below
        elif item.costly and known and item.method in stay:
            continue
        stay.add(item.method)
        tried.append((item, specs))
    return tried
