"""ReplaceMe (arXiv 2505.02819): a linear transform, folded into the block before, replaces the removed blocks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cospadi.depth.base import depth_method
from cospadi.depth.branch import Branch, find_branch
from cospadi.depth.choose import choose_runs
from cospadi.depth.distances import chosen_run
from cospadi.depth.evidence import REMEDY, Evidence
from cospadi.depth.normal_equations import NormalEquations, Sums
from cospadi.depth.surgery import Cut
from cospadi.depth.transform import Structure, cosine, held_out_ridge, least_squares
from cospadi.errors import RecipeError
from cospadi.model_view import LayerReplay, guard_memory

Solver = Literal["least_squares", "cosine"]
LONE_RIDGE = 1e-2


@depth_method("replaceme", paper="arXiv 2505.02819")
def replaceme(
    evidence: Evidence,
    blocks: int,
    *,
    solver: Solver = "least_squares",
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

    Block i gives L_i = Y_i + M_i, M_i its MLP's output. The run i+1 … i+n of least mean cosine distance between L_i
    and L_{i+n} goes; T minimises the distance between M_i T + Y_i and L_{i+n} and is folded into block i's last
    linear layer, so the architecture is unchanged. Inputs of T come from the model as pruned so far, targets from the
    original one; with one transform that is what is published.

    Args:
        evidence: model and text.
        blocks: how many go.
        solver: ``least_squares`` (closed form) or ``cosine`` (Adam on cos(M T, L_{i+n} − Y_i), as published).
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
    if transforms == 1:
        first = chosen_run(distances, blocks, start, first=1)
        runs = [(first, first + blocks)]
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

    fits: dict[int, _Fit] = {}
    for run in runs:
        keep = min(tokens, evidence.tokens.count) if solver == "cosine" else 0
        rows, branch = _rows(evidence, run, fits, separate, keep, relative)
        if rows.equations.tokens < len(rows.equations.gram):
            warnings.warn(
                f"the calibration text has {rows.equations.tokens} tokens, fewer than the {len(rows.equations.gram)} "
                "dimensions of the transform: the ridge decides the rest; give more --samples",
                stacklevel=2,
            )
        fits[run[0] - 1] = _Fit(run, branch, *solve(rows), rows.equations)
    return _cut(evidence, fits, solver)


@dataclass(frozen=True)
class _Fit:
    """A transform that stands after block ``run[0] - 1``: on its branch, or (without one) on the hidden state."""

    run: tuple[int, int]
    branch: Branch | None
    transform: Tensor
    ridge: float | None
    equations: NormalEquations


@dataclass
class Rows:
    """M and R of a transform: their sums and, for the cosine solver, a random part of the rows."""

    halves: tuple[NormalEquations, ...]
    inputs: list[Tensor]
    targets: list[Tensor]

    @cached_property
    def equations(self) -> NormalEquations:
        """Of the whole text."""
        return self.halves[0] if len(self.halves) == 1 else self.halves[0] + self.halves[1]

    def ridge(self, structure: Structure, rank: int) -> float:
        """The ridge that fits held-out sequences best; a small one where there is only one sequence."""
        if len(self.halves) == 1 or structure == "orthonormal":
            return LONE_RIDGE
        return held_out_ridge((self.halves[0], self.halves[1]), structure=structure, rank=rank)

    def kept(self) -> tuple[Tensor, Tensor]:
        """The rows (tokens, width) of M and R."""
        return torch.cat(self.inputs), torch.cat(self.targets)


def _rows(
    evidence: Evidence, run: tuple[int, int], fits: dict[int, _Fit], separate: bool, keep: int, relative: bool
) -> tuple[Rows, Branch | None]:
    """Stream M of block run[0]-1 and R = L − Y through the sums (M the hidden state and Y = 0 if separate)."""
    view, (start, stop) = evidence.view, run
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    with LayerReplay(view, evidence.device) as replay, guard_memory(f"fitting block {start - 1}", REMEDY):
        branch = None if separate else find_branch(view, start - 1, replay)
        sums: tuple[Sums, Sums] | None = None
        sequences = 0
        draw = _drawn(evidence.tokens.count, keep, evidence.seed)
        place = 0
        for ids, mask in evidence.batched(evidence.tokens, f"blocks {start} to {stop - 1}"):
            embedded = replay.embed(ids)
            m, y = _inputs(replay, embedded, start, fits, branch)
            target = _original(replay, embedded, stop)
            real = mask.to(m.device)
            rows, residuals = m[real], (target - y)[real]
            sums = sums or (Sums(m.shape[-1], replay.device), Sums(m.shape[-1], replay.device))
            scale = _scale(target) if relative else torch.ones_like(target[..., :1])
            for offset in (0, 1):  # every other sequence
                half = (torch.arange(len(ids), device=m.device) + sequences) % 2 == offset
                chosen = real & half[:, None]
                sums[offset].add(scale[chosen] * m[chosen], scale[chosen] * (target - y)[chosen])
            sequences += len(ids)
            if keep:
                chosen = draw[place : place + len(rows)].to(rows.device)
                inputs.append(rows[chosen].to(torch.bfloat16))
                targets.append(residuals[chosen].to(torch.bfloat16))
            place += len(rows)
    assert sums is not None
    halves = tuple(half.finish(f"block {start - 1}") for half in sums if half.tokens)
    return Rows(halves, inputs, targets), branch


def _scale(hidden: Tensor) -> Tensor:
    """1/‖L‖ of every token (…, 1) in float32 or wider; 1 where a state is zero."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0).reciprocal()


def _drawn(count: int, keep: int, seed: int) -> Tensor:
    """Which of `count` tokens are kept, as a mask."""
    mask = torch.zeros(count, dtype=torch.bool)
    if keep:
        mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:keep]] = True
    return mask


def _inputs(
    replay: LayerReplay, hidden: Tensor, start: int, fits: dict[int, _Fit], branch: Branch | None
) -> tuple[Tensor, Tensor]:
    """M and Y before the run, in the model with the transforms of earlier runs."""
    index = 0
    while index < start - 1:
        fit = fits.get(index)
        if fit is None:
            hidden = replay.layer(index, hidden)
            index += 1
            continue
        if fit.branch is None:
            hidden = replay.layer(index, hidden)
            hidden = hidden @ fit.transform.to(hidden)
        else:
            hidden = fit.branch.run(replay, hidden, fit.transform)[0]
        index = fit.run[1]
    if branch is None:
        hidden = replay.layer(start - 1, hidden)
        return hidden, torch.zeros_like(hidden)
    out, m = branch.run(replay, hidden)
    return m, out - m


def _original(replay: LayerReplay, hidden: Tensor, depth: int) -> Tensor:
    """Input of block `depth` in the original model."""
    for index in range(depth):
        hidden = replay.layer(index, hidden)
    return hidden


def _cut(evidence: Evidence, fits: dict[int, _Fit], solver: Solver) -> Cut:
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
        {"measure": "mean cosine distance of all tokens", "solver": solver, "transforms": told},
    )
