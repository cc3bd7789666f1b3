"""ReplaceMe (arXiv 2505.02819): a linear transform, folded into the block before, replaces the removed blocks."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cospadi.depth.base import depth_method
from cospadi.depth.choose import choose_runs
from cospadi.depth.distances import chosen_run
from cospadi.depth.evidence import Evidence
from cospadi.depth.rows import Fit, Rows, stream_rows
from cospadi.depth.surgery import Cut
from cospadi.depth.transform import Structure, cosine, least_squares
from cospadi.depth.trial import Trial, cheapest, tried
from cospadi.errors import RecipeError

Solver = Literal["least_squares", "cosine"]
Select = Literal["loss", "error", "cosine"]
MEASURES = {
    "loss": "loss of the model with the transform",
    "error": "error of the transform",
    "cosine": "mean cosine distance of all tokens",
}


@depth_method("replaceme", paper="arXiv 2505.02819")
def replaceme(
    evidence: Evidence,
    blocks: int,
    *,
    solver: Solver = "least_squares",
    select: Select | None = None,
    candidates: Annotated[int, Field(ge=1)] = 8,
    samples: Annotated[int, Field(ge=2)] = 64,
    structure: Structure = "full",
    rank: Annotated[int, Field(ge=1)] = 64,
    ridge: Annotated[float, Field(ge=0)] | None = None,
    relative: bool = True,
    transforms: Annotated[int, Field(ge=1)] = 1,
    consecutive: bool = False,
    separate: bool = False,
    start: Annotated[int, Field(ge=0)] | None = None,
    epochs: Annotated[int, Field(ge=1)] = 10,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
    tokens: Annotated[int, Field(ge=1)] = 262_144,
) -> Cut:
    """Replace a run of blocks by a linear transform in the block before it.

    Block i gives L_i = Y_i + M_i, M_i its MLP's output. A run i+1 … i+n goes, see `select`; T minimises the distance
    between M_i T + Y_i and L_{i+n} and is folded into block i's last linear layer, so the architecture is unchanged.
    Inputs of T come from the model as pruned so far, targets from the original one; with one transform that is what is
    published.

    Args:
        evidence: model and text.
        blocks: how many go.
        solver: ``least_squares`` (closed form) or ``cosine`` (Adam on cos(M T, L_{i+n} − Y_i), as published).
        select: by what the run is chosen: ``loss`` (the default for one transform): of the nearest runs, the one with
            which the model's loss is least, each with a least-squares transform fitted to half of the sequences and
            measured on the other half; ``error``: likewise, by the transform's error; ``cosine``: the nearest run,
            as published (and for several transforms).
        candidates: so many of the nearest runs are tried.
        samples: the trials see the first so many sequences.
        structure: of T: ``full``, ``diagonal``, ``orthonormal`` or ``low_rank``; see
            :func:`~cospadi.depth.transform.least_squares`.
        rank: of ``low_rank``.
        ridge: relative ridge of least squares; left out: the one whose transform, solved on one half of the
            sequences, fits the other half best.
        relative: least squares counts the error of every token against the size of its hidden state L_{i+n}, which is
            what the next norm sees; False: all alike, as published. Without it the few tokens with massive activations
            (the first of a sequence above all) decide T, and the other tokens pay.
        transforms: number of runs, each with a transform of its own; their lengths are chosen too.
        consecutive: whether runs may touch; touching runs become one, with one transform.
        separate: keep the transform as a linear block of its own that maps the whole hidden state, instead of folding
            it. Such a checkpoint loads with this package only; it also fits architectures with a norm after the MLP.
        start: the first block of the run, instead of the nearest run.
        epochs: of the cosine solver.
        learning_rate: of the cosine solver.
        tokens: the cosine solver keeps at most so many tokens' activations, in bfloat16.

    Raises:
        RecipeError: if options contradict each other or the model.
        BudgetError: if no such runs exist: the first block always stays.
        ModelError: if the transform cannot be folded (a norm follows the MLP) and `separate` is not set.
        NumericalError: on NaN or Inf in activations.
    """
    if solver == "cosine" and structure not in ("full", "diagonal"):
        raise RecipeError(f"the cosine solver learns full or diagonal transforms, not structure={structure}")
    distances = evidence.pairs.cosine
    trials: list[Trial] = []
    if transforms == 1:
        first = chosen_run(distances, blocks, start, first=1)
        if start is None and select != "cosine":
            near = cheapest(distances, blocks, candidates, first=1)
            trials = [
                tried(evidence, run, samples, structure, rank, ridge, separate=separate, relative=relative)
                for run in near
            ]
            first = min(trials, key=lambda trial: trial.error if select == "error" else trial.loss).run[0]
        runs = [(first, first + blocks)]
    elif select in ("loss", "error"):
        raise RecipeError(f"select={select} tries single runs; several transforms are chosen by select=cosine")
    elif start is not None:
        raise RecipeError("start says where one run begins; leave it out with several transforms")
    else:
        runs = choose_runs(distances, blocks, transforms, first=1, touching=consecutive)

    def solve(rows: Rows) -> tuple[Tensor, float | None]:
        if solver == "least_squares":
            chosen = rows.ridge(structure, rank) if ridge is None else ridge
            return least_squares(rows.equations, ridge=chosen, structure=structure, rank=rank), chosen
        found = cosine(
            *rows.kept(),
            epochs=epochs,
            learning_rate=learning_rate,
            diagonal=structure == "diagonal",
            seed=evidence.seed,
            progress=lambda done, total: evidence.progress("transform", done, total, "epochs"),
        )
        return found, None

    fits: dict[int, Fit] = {}
    for run in runs:
        keep = min(tokens, evidence.tokens.count) if solver == "cosine" else 0
        rows, branch = stream_rows(evidence, run, fits, separate=separate, relative=relative, keep=keep)
        if rows.equations.tokens < len(rows.equations.gram):
            warnings.warn(
                f"the calibration text has {rows.equations.tokens} tokens, fewer than the {len(rows.equations.gram)} "
                "dimensions of the transform: the ridge decides the rest; give more --samples",
                stacklevel=2,
            )
        fits[run[0] - 1] = Fit(run, branch, *solve(rows), rows.equations)
    return _cut(evidence, fits, solver, select or ("loss" if trials else "cosine"), trials)


def _cut(evidence: Evidence, fits: dict[int, Fit], solver: Solver, select: Select, trials: list[Trial]) -> Cut:
    weights: dict[str, Tensor] = {}
    separate: dict[int, Tensor] = {}
    told: list[dict[str, Any]] = []
    for fit in fits.values():
        if fit.branch is None:
            separate[fit.run[0]] = fit.transform
        else:
            weights |= fit.branch.folded(evidence.view, fit.transform)
        plain = fit.equations.loss(torch.eye(len(fit.transform)))
        told.append(
            {
                "removed": list(range(*fit.run)),
                "into": f"{evidence.view.layers_name}.{fit.run[0] - 1}.{fit.branch.path}" if fit.branch else None,
                "distance": float(evidence.pairs.cosine[fit.run]),
                "ridge": fit.ridge,
                "error": fit.equations.loss(fit.transform) / plain if plain else 0.0,
            }
        )
    removed = sorted(index for fit in fits.values() for index in range(*fit.run))
    return Cut(
        tuple(removed),
        weights,
        separate,
        {
            "measure": MEASURES[select],
            "solver": solver,
            "transforms": told,
            **({"trials": [asdict(trial) for trial in trials]} if trials else {}),
        },
    )
