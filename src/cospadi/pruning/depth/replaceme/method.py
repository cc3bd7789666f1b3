"""ReplaceMe (arXiv 2505.02819): a linear transform, folded into the block before, replaces the removed blocks."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cospadi.errors import RecipeError
from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.choose_runs import choose_runs
from cospadi.pruning.depth.distances import chosen_run, require_run
from cospadi.pruning.depth.replaceme.rows import Fit, Fold, Rows, place, stream_rows
from cospadi.pruning.depth.replaceme.transform import Structure, cosine
from cospadi.pruning.depth.replaceme.trials import CorrectionTrial, best, cheapest, solutions, tried
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import Evidence

Solver = Literal["least_squares", "cosine"]
Select = Literal["loss", "error", "cosine"]
MEASURES = {
    "loss": "held-out loss of the model with the correction",
    "error": "held-out error of the correction",
    "cosine": "mean cosine distance of all tokens",
}
HELD_OUT = 8
"""At most every so manieth sequence is held out."""


@pruning_method("replaceme", paper="arXiv 2505.02819")
def replaceme(
    evidence: Evidence,
    blocks: int,
    *,
    solver: Solver = "least_squares",
    fold: Fold = "transform",
    select: Select | None = None,
    candidates: Annotated[int, Field(ge=1)] = 8,
    samples: Annotated[int, Field(ge=2)] = 32,
    structure: Structure | None = None,
    rank: Annotated[int, Field(ge=1)] = 64,
    ridge: Annotated[float, Field(ge=0)] | None = None,
    gain: Annotated[float, Field(gt=0, le=1)] = 1.0,
    relative: bool = True,
    transforms: Annotated[int, Field(ge=1)] = 1,
    consecutive: bool = False,
    separate: bool = False,
    start: Annotated[int, Field(ge=0)] | None = None,
    epochs: Annotated[int, Field(ge=1)] = 10,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
    tokens: Annotated[int, Field(ge=1)] = 262_144,
) -> Cut:
    """Replace a run of blocks by a linear map in the block before it.

    Block i gives L_i = Y_i + M_i, M_i = A_i W what its MLP's last layer W makes of A_i. A run i+1 … i+n goes, and W is
    changed so that block i gives, as nearly as it can, L_{i+n}; so the architecture is unchanged and nothing is added.
    As published W becomes W T, T a least-squares fit of M_i T to L_{i+n} − Y_i; by default T is the best orthonormal
    matrix. A fit without that constraint has the lower error on text like the calibration text and learns that text's
    domain: fitted to encyclopedia text, llama-29m was better on documentation with the orthonormal T than with a full
    one or with all of W refitted (``fold=down``), at 1, 2 and 3 removed blocks of 9. The paper saw the opposite at 8B
    (of unweighted errors), so with much text of the right kind try ``structure=full``. Inputs come from the model as
    pruned so far, targets from the original one; with one run that is what is published.

    Args:
        evidence: model and text.
        blocks: how many go.
        solver: ``least_squares`` (closed form) or ``cosine`` (Adam on cos(M T, L_{i+n} − Y_i), as published).
        fold: ``transform``: W T; ``down``: W + D, D of least ‖A D − (L_{i+n} − L_i)‖², not with ``solver=cosine``, a
            `structure` or `separate`.
        select: by what the run and the ridge are chosen: ``loss`` (the default): of the nearest runs, the one with
            which the model's loss is least, each with a least-squares fit to half of the first `samples` sequences
            and measured on the other half; then the ridge with which it is least on every eighth sequence (or fewer:
            half of `samples`), the fit being to the others. Plain removal is among the choices, so the result is never
            worse on this text.
            ``error``: likewise, by the distance to L_{i+n}; ``cosine``: the nearest run, as published, its ridge by
            the distance. With several runs these are the nearest ones.
        candidates: so many of the nearest runs are tried.
        samples: trials of runs see the first so many sequences; at most half as many are held out afterwards.
        structure: of T: ``full``, ``diagonal``, ``orthonormal`` or ``low_rank``; see
            :func:`~cospadi.pruning.depth.replaceme.transform.least_squares`. Left out: ``orthonormal`` of a folded T
            by least squares, else ``full``.
        rank: of ``low_rank``.
        ridge: relative ridge of least squares towards plain removal; left out: chosen as `select` says, of an
            orthonormal T between none and plain removal.
        gain: of the ridges on trial the largest that brings at least this share of the best one's gain over plain
            removal. Less than 1 gives up some of it on text like the calibration text, and keeps more elsewhere.
        relative: least squares counts the error of every token against the size of its hidden state L_{i+n}, which is
            what the next norm sees; False: all alike, as published. Without it the few tokens with massive activations
            (the first of a sequence above all) decide the fit, and the other tokens pay.
        transforms: number of runs, each with a correction of its own; their lengths are chosen too.
        consecutive: whether runs may touch; touching runs become one, with one correction.
        separate: keep the transform as a linear block of its own that maps the whole hidden state, instead of folding
            it. Such a checkpoint loads with this package only; it also fits architectures with a norm after the MLP.
        start: the first block of the run, instead of having it chosen.
        epochs: of the cosine solver.
        learning_rate: of the cosine solver.
        tokens: the cosine solver keeps at most so many tokens' activations, in bfloat16.

    Raises:
        RecipeError: if options contradict each other or the model.
        BudgetError: if no such runs exist: the first block always stays.
        ModelError: if nothing can be folded (a norm follows the MLP) and `separate` is not set.
        NumericalError: on NaN or Inf in activations, or if no loss is finite.
    """
    structure = _agreed(structure, solver, fold, select, ridge, gain, transforms, separate=separate, start=start)
    require_run(len(evidence.view.layers), blocks, start, first=1)
    measure = "loss" if select in (None, "loss") else "error"
    distances = evidence.pairs.cosine

    def trial_of_run(run: tuple[int, int]) -> CorrectionTrial:
        """The best of the least-squares corrections of a run, fitted to half of a few sequences."""
        fitted, held = evidence.tokens.first(samples).parted(2)
        where = place(evidence, run, fold, separate=separate)
        rows = stream_rows(evidence, where, {}, fitted, relative=relative)
        options = solutions(rows, where, structure, rank, ridge, held_out=held is not fitted)
        losses = "nearest" if measure == "loss" else "none"
        found = tried(evidence, options, {}, held, relative=relative, losses=losses)
        return found[best(found, measure)]

    def solve(where: Fit, fits: dict[int, Fit]) -> tuple[Fit, Rows, list[CorrectionTrial]]:
        """The correction of a run, fitted to the whole text but what it is chosen by."""
        choosing = ridge is None if solver == "least_squares" else measure == "loss"
        every = max(HELD_OUT, -(-len(evidence.tokens.ids) // (samples // 2)))
        fitted, held = evidence.tokens.parted(every) if choosing else (evidence.tokens, evidence.tokens)
        keep = min(tokens, fitted.count) if solver == "cosine" else 0
        rows = stream_rows(evidence, where, fits, fitted, relative=relative, keep=keep)
        if rows.equations.tokens < len(rows.equations.gram):
            warnings.warn(
                f"the correction is fitted to {rows.equations.tokens} tokens, fewer than the "
                f"{len(rows.equations.gram)} dimensions of the layer: in the others it stays near plain removal; give "
                "more --samples",
                stacklevel=2,
            )
        if solver == "least_squares":
            options = solutions(rows, where, structure, rank, ridge, held_out=held is not fitted)
        else:
            assert rows.inputs is not None and rows.targets is not None
            transform = cosine(
                rows.inputs,
                rows.targets,
                epochs=epochs,
                learning_rate=learning_rate,
                diagonal=structure == "diagonal",
                seed=evidence.seed,
                progress=lambda done, total: evidence.progress("transform", done, total, "epochs"),
            )
            step = transform - torch.eye(len(transform), dtype=transform.dtype)
            options = [*([where] if choosing else []), where.corrected(step, None)]
        if len(options) == 1:
            return options[0], rows, []
        losses = "all" if measure == "loss" else "none"
        found = tried(evidence, options, fits, held, relative=relative, losses=losses)
        return options[best(found, measure, gain)], rows, found

    trials: list[CorrectionTrial] = []
    if transforms > 1:
        runs = choose_runs(distances, blocks, transforms, first=1, touching=consecutive)
    else:
        first = chosen_run(distances, blocks, start, first=1)
        if start is None and select != "cosine":
            trials = [trial_of_run(run) for run in cheapest(distances, blocks, candidates, first=1)]
            first = trials[best(trials, measure)].run[0]
        runs = [(first, first + blocks)]
    fits: dict[int, Fit] = {}
    told: list[dict[str, Any]] = []
    for run in runs:
        fit, rows, found = solve(place(evidence, run, fold, separate=separate), fits)
        fits[run[0] - 1] = fit
        told.append(_told(evidence, fit, rows, found))
    facts = {
        "measure": MEASURES[measure if trials else "cosine"],
        "solver": solver,
        "fold": fold,
        "structure": structure,
        "transforms": told,
    }
    return _cut(evidence, fits, facts | ({"trials": [asdict(trial) for trial in trials]} if trials else {}))


def _agreed(
    structure: Structure | None,
    solver: Solver,
    fold: Fold,
    select: Select | None,
    ridge: float | None,
    gain: float,
    transforms: int,
    *,
    separate: bool,
    start: int | None,
) -> Structure:
    """The structure of T, where the options of :func:`replaceme` do not contradict each other.

    Raises:
        RecipeError: if they do.
    """
    if structure is None:
        structure = "full" if solver == "cosine" or fold == "down" or separate else "orthonormal"
    if solver == "cosine" and structure not in ("full", "diagonal"):
        raise RecipeError(f"the cosine solver learns full or diagonal transforms, not structure={structure}")
    if fold == "down" and (solver == "cosine" or structure != "full" or separate):
        raise RecipeError(
            "fold=down fits the whole down projection by least squares: leave out solver, structure and separate, or "
            "say fold=transform"
        )
    if gain < 1 and (ridge is not None or solver == "cosine" or structure == "orthonormal"):
        raise RecipeError(
            "gain chooses among ridges: leave out ridge and solver, and say fold=down or structure=full, diagonal or "
            "low_rank"
        )
    if transforms > 1 and select in ("loss", "error"):
        raise RecipeError(f"select={select} tries single runs; several transforms are chosen by select=cosine")
    if transforms > 1 and start is not None:
        raise RecipeError("start says where one run begins; leave it out with several transforms")
    return structure


def _told(evidence: Evidence, fit: Fit, rows: Rows, found: list[CorrectionTrial]) -> dict[str, Any]:
    """What the report says of a correction."""
    width = rows.equations.cross.shape[1]
    nothing = torch.zeros(len(rows.equations.gram), width) if fit.fold == "down" else torch.eye(width)
    plain = rows.equations.loss(nothing)
    error = plain if fit.step is None else rows.equations.loss(nothing.to(fit.step) + fit.step)
    return {
        "removed": list(range(*fit.run)),
        "into": f"{evidence.view.layers_name}.{fit.run[0] - 1}.{fit.branch.path}" if fit.branch else None,
        "distance": float(evidence.pairs.cosine[fit.run]),
        "ridge": fit.ridge,
        "corrected": fit.step is not None,
        "error": error / plain if plain else 0.0,
        **({"held_out": [asdict(trial) for trial in found]} if found else {}),
    }


def _cut(evidence: Evidence, fits: dict[int, Fit], facts: dict[str, Any]) -> Cut:
    weights: dict[str, Tensor] = {}
    separate: dict[int, Tensor] = {}
    for fit in fits.values():
        if fit.step is None:
            continue
        transform = torch.eye(*fit.step.shape, dtype=fit.step.dtype) + fit.step
        if fit.branch is None:
            separate[fit.run[0]] = transform
        elif fit.fold == "down":
            weights |= fit.branch.refitted(evidence.view, fit.step)
        else:
            weights |= fit.branch.folded(evidence.view, transform)
    removed = sorted(index for fit in fits.values() for index in range(*fit.run))
    return Cut(tuple(removed), weights, separate, facts)
