"""ReplaceMe (arXiv 2505.02819): a linear transform, folded into the block before, replaces the removed blocks."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cospadi.errors import RecipeError
from cospadi.model_view import require_predictions
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
Measure = Literal["loss", "error"]
MEASURES = {
    "loss": "held-out loss of the model with the correction",
    "error": "held-out error of the correction",
    "cosine": "mean cosine distance over all tokens",
}
HELD_OUT = 8
"""At most one sequence in so many is held out."""


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
    """Replace a run of blocks by a linear map folded into the block before it.

    Block i computes L_i = Y_i + M_i, where M_i = A_i W is the output of its MLP's last layer W on inputs A_i. The run
    i+1 … i+n is removed, and W changes so that the output of block i approximates L_{i+n}. Architecture and size of the
    other blocks do not change.

    As published, W becomes W T with T fitted by least squares, M_i T ≈ L_{i+n} − Y_i. The default restricts T to
    orthonormal matrices. An unrestricted T has a lower error on text like the calibration text, but overfits its
    domain: fitted to encyclopedia text, llama-29m was better on documentation with an orthonormal T than with a full
    one, or with all of W refitted (``fold=down``), at 1, 2 and 3 of 9 blocks removed. The paper found the opposite for
    8B models (with unweighted errors), so with plenty of suitable text try ``structure=full``. Inputs come from the
    model as pruned so far, targets from the original one; for a single run this is what the paper does.

    Deviations from the published defaults (least squares as published: ``structure=full select=cosine relative=false
    ridge=0``; cosine as published: ``solver=cosine select=cosine``):

    * The run is chosen by the loss on held-out text instead of the distance L_i to L_{i+n}. The paper takes the mean
      cosine distance (``select=cosine``); the authors' code takes the angular distance of the last token, measured on
      a 4-bit model.
    * T is orthonormal instead of full, and the tokens of a least-squares fit are weighted (`relative`). The authors'
      code has no orthonormal T.
    * `ridge` is relative to the mean of diag(MᵀM) and pulls T towards the identity, that is towards plain removal. The
      paper's α is absolute (10⁴ in its ablation) and pulls T towards zero.
    * Padding never enters the statistics; it does in the authors' code.
    * The cosine solver keeps the activations of at most `tokens` tokens; the authors' code keeps all of them. Its
      epochs, learning rate, batch of 1024 tokens and start at the identity are the published ones.
    * The L1 penalty and the masking augmentation of the paper's ablations are not implemented.

    Args:
        evidence: model and text.
        blocks: number of blocks to remove.
        solver: ``least_squares`` (closed form) or ``cosine`` (Adam on cos(M T, L_{i+n} − Y_i), as published).
        fold: ``transform``: W T. ``down``: W + D, with D minimising ‖A D − (L_{i+n} − L_i)‖²; excludes
            ``solver=cosine``, `structure` and `separate`.
        select: criterion that chooses the run and the ridge. ``loss`` (default): each of the nearest runs is corrected
            by least squares on half of the first `samples` sequences; the run with the lowest loss of the model on the
            other half is removed. Its ridge is the one with the lowest loss on every eighth sequence (fewer for long
            texts: half of `samples`), fitted on the others. Plain removal is always a candidate, so the result is
            never worse than it on this text. ``error``: the same with the distance to L_{i+n}. ``cosine``: the nearest
            run, as published, its ridge chosen by that distance. Several runs are always the nearest ones.
        candidates: number of nearest runs to try.
        samples: number of sequences for trying runs; at most half as many are held out afterwards.
        structure: of T: ``full``, ``diagonal``, ``orthonormal`` or ``low_rank``; see
            :func:`~cospadi.pruning.depth.replaceme.transform.least_squares`. Left out: ``orthonormal`` for a folded T
            by least squares, else ``full``.
        rank: of ``low_rank``.
        ridge: relative ridge of least squares towards plain removal. Left out: chosen by `select`; for an orthonormal
            T the choice is between none and plain removal.
        gain: take the largest ridge that achieves this share of the best ridge's gain over plain removal. Less than 1
            gives up some quality on text like the calibration text to keep more on other text.
        relative: weight the error of each token by 1/‖L_{i+n}‖², the scale that the next norm sees. False: all tokens
            weigh the same, as published; a few tokens with massive activations (the first of a sequence above all)
            then dominate the fit.
        transforms: number of runs, each with its own correction; their lengths are chosen too.
        consecutive: whether runs may be adjacent; adjacent runs are merged into one, with one correction.
        separate: keep the transform as a linear block of its own that maps the whole hidden state, instead of folding
            it. Such a checkpoint loads with this package only. It also works for architectures with a norm after the
            MLP.
        start: the first block of the run, instead of choosing one.
        epochs: of the cosine solver.
        learning_rate: of the cosine solver.
        tokens: the cosine solver keeps the activations of at most so many tokens, in bfloat16.

    Raises:
        RecipeError: if options contradict each other or the model.
        BudgetError: if no such runs exist: the first block always stays.
        ModelError: if nothing can be folded (a norm follows the MLP) and `separate` is not set.
        NumericalError: on NaN or Inf in activations, or if no loss is finite.
    """
    structure = _agreed(structure, solver, fold, select, ridge, gain, transforms, separate=separate, start=start)
    require_run(len(evidence.view.layers), blocks, start, first=1)
    measure: Measure = "loss" if select in (None, "loss") else "error"
    if measure == "loss":
        require_predictions(
            evidence.view.model, "replaceme with select=loss", "use --set select=error or select=cosine"
        )
    corrector = _Corrector(
        evidence,
        solver=solver,
        fold=fold,
        measure=measure,
        structure=structure,
        rank=rank,
        ridge=ridge,
        gain=gain,
        relative=relative,
        separate=separate,
        samples=samples,
        epochs=epochs,
        learning_rate=learning_rate,
        tokens=tokens,
    )
    distances = evidence.pairs.cosine
    trials: list[CorrectionTrial] = []
    if transforms > 1:
        runs = choose_runs(distances, blocks, transforms, first=1, touching=consecutive)
    else:
        first = chosen_run(distances, blocks, start, first=1)
        if start is None and select != "cosine":
            trials = [corrector.try_run(run) for run in cheapest(distances, blocks, candidates, first=1)]
            first = trials[best(trials, measure)].run[0]
        runs = [(first, first + blocks)]
    fits: dict[int, Fit] = {}
    told: list[dict[str, Any]] = []
    for run in runs:
        fit, rows, found = corrector.correct(run, fits)
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


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of :func:`replaceme` that decide how a correction is fitted."""

    solver: Solver
    fold: Fold
    measure: Measure
    structure: Structure
    rank: int
    ridge: float | None
    gain: float
    relative: bool
    separate: bool
    samples: int
    epochs: int
    learning_rate: float
    tokens: int


class _Corrector:
    """Fits the correction of a run and chooses among the possible ones."""

    def __init__(self, evidence: Evidence, **options: Any) -> None:
        self.evidence, self.options = evidence, _Options(**options)

    def try_run(self, run: tuple[int, int]) -> CorrectionTrial:
        """The best least-squares correction of a run, fitted on half of a few sequences, measured on the other half."""
        o = self.options
        fitted, held = self.evidence.tokens.first(o.samples).parted(2)
        where = place(self.evidence, run, o.fold, separate=o.separate)
        rows = stream_rows(self.evidence, where, {}, fitted, relative=o.relative)
        corrections = solutions(rows, where, o.structure, o.rank, o.ridge, held_out=held is not fitted)
        losses = "nearest" if o.measure == "loss" else "none"
        found = tried(self.evidence, corrections, {}, held, relative=o.relative, losses=losses)
        return found[best(found, o.measure)]

    def correct(self, run: tuple[int, int], fits: dict[int, Fit]) -> tuple[Fit, Rows, list[CorrectionTrial]]:
        """The correction of a run, fitted on all text except the part that chooses among corrections.

        Args:
            run: (first block, one past the last).
            fits: earlier corrections, by their blocks.

        Returns:
            the correction, what it was fitted on, and the trials that it was chosen from (empty without a choice).
        """
        o, text = self.options, self.evidence.tokens
        where = place(self.evidence, run, o.fold, separate=o.separate)
        choosing = o.ridge is None if o.solver == "least_squares" else o.measure == "loss"
        every = max(HELD_OUT, -(-len(text.ids) // (o.samples // 2)))
        fitted, held = text.parted(every) if choosing else (text, text)
        keep = min(o.tokens, fitted.count) if o.solver == "cosine" else 0
        rows = stream_rows(self.evidence, where, fits, fitted, relative=o.relative, keep=keep)
        _warn_of_little_text(rows)
        if o.solver == "least_squares":
            corrections = solutions(rows, where, o.structure, o.rank, o.ridge, held_out=held is not fitted)
        else:
            corrections = [*([where] if choosing else []), where.corrected(self._cosine_step(rows), None)]
        if len(corrections) == 1:
            return corrections[0], rows, []
        losses = "all" if o.measure == "loss" else "none"
        found = tried(self.evidence, corrections, fits, held, relative=o.relative, losses=losses)
        return corrections[best(found, o.measure, o.gain)], rows, found

    def _cosine_step(self, rows: Rows) -> Tensor:
        """T − I of the cosine solver."""
        o, progress = self.options, self.evidence.progress
        assert rows.inputs is not None and rows.targets is not None
        transform = cosine(
            rows.inputs,
            rows.targets,
            epochs=o.epochs,
            learning_rate=o.learning_rate,
            diagonal=o.structure == "diagonal",
            seed=self.evidence.seed,
            progress=lambda done, total: progress("transform", done, total, "epochs"),
        )
        return transform - torch.eye(len(transform), dtype=transform.dtype)


def _warn_of_little_text(rows: Rows) -> None:
    tokens, dimensions = rows.equations.tokens, len(rows.equations.gram)
    if tokens < dimensions:
        warnings.warn(
            f"the correction is fitted to {tokens} tokens, fewer than the {dimensions} dimensions of the layer, and "
            "stays near plain removal in the remaining directions; use more --samples",
            stacklevel=2,
        )


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
    """The structure of T, if the options of :func:`replaceme` do not contradict each other.

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
            "set fold=transform"
        )
    if gain < 1 and (ridge is not None or solver == "cosine" or structure == "orthonormal"):
        raise RecipeError(
            "gain chooses among ridges: leave out ridge and solver, and set fold=down or structure=full, diagonal or "
            "low_rank"
        )
    if transforms > 1 and select in ("loss", "error"):
        raise RecipeError(f"select={select} tries single runs; several transforms are chosen by select=cosine")
    if transforms > 1 and start is not None:
        raise RecipeError("start sets where a single run begins; leave it out with several transforms")
    return structure


def _told(evidence: Evidence, fit: Fit, rows: Rows, found: list[CorrectionTrial]) -> dict[str, Any]:
    """What the report says about a correction."""
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
    """The edit that removes the runs and writes their corrections."""
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
