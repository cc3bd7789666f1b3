"""Measure corrections on text that they were not fitted on.

Distances between hidden states tell how far a run moves them, but neither how much of that a linear map can recover nor
how much the rest raises the loss. Trials measure both, and plain removal is always one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from cospadi.errors import BudgetError, NumericalError
from cospadi.model_view import LayerReplay
from cospadi.pruning.depth.replaceme.rows import Fit, Rows, original_after, states_before, through, weights_of
from cospadi.pruning.depth.replaceme.transform import RIDGES, Structure, correction, least_squares
from cospadi.pruning.depth.sleb import head_replay, summed_loss
from cospadi.pruning.evidence import REMEDY, Evidence, Tokens
from cospadi.runtime.memory import guard_memory

LONE_RIDGE = 1e-2


@dataclass(frozen=True)
class CorrectionTrial:
    """Held-out cost of removing a run with one correction.

    Attributes:
        run: (first block, one past the last).
        ridge: that the correction was solved with; None: no correction, or not by least squares.
        corrected: whether there is a correction.
        error: mean squared distance to the original stream L after the run, relative to ‖L‖² per token if the fit is.
        loss: mean next-token loss of the model; None if not measured.
    """

    run: tuple[int, int]
    ridge: float | None
    corrected: bool
    error: float
    loss: float | None = None


def cheapest(distances: Tensor, blocks: int, count: int, *, first: int = 0) -> list[tuple[int, int]]:
    """The `count` runs of `blocks` blocks with the least distance, nearest first.

    Args:
        distances: (depths, depths).
        blocks: length of a run.
        count: number of runs; fewer are returned if there are no more.
        first: the first block that may be removed.

    Raises:
        BudgetError: if too few blocks may be removed.
    """
    prices = distances.diagonal(blocks)[first:].tolist()
    if not prices:
        raise BudgetError(f"cannot remove {blocks} blocks in a row: the method keeps the first {first}")
    order = sorted(range(len(prices)), key=lambda place: (prices[place], -place))
    return [(first + place, first + place + blocks) for place in order[:count]]


def solutions(
    rows: Rows, fit: Fit, structure: Structure, rank: int, ridge: float | None, *, held_out: bool
) -> list[Fit]:
    """Least-squares corrections to choose from: one with the requested ridge, or one for each of several.

    Args:
        rows: what they are fitted on.
        fit: the place.
        structure: of a transform.
        rank: of a low-rank transform.
        ridge: the requested one; None: several ridges, preceded by plain removal.
        held_out: whether there is other text to choose by; without it, only one ridge is offered.
    """
    ridges: Sequence[float]
    if ridge is not None:
        ridges = (ridge,)
    elif structure == "orthonormal":
        ridges = (0.0,)
    else:
        ridges = RIDGES if held_out else (LONE_RIDGE,)
    found = [fit] if ridge is None else []
    for each in ridges:
        if fit.fold == "down":
            found.append(fit.corrected(correction(rows.equations, ridge=each), each))
        else:
            transform = least_squares(rows.equations, ridge=each, structure=structure, rank=rank)
            found.append(fit.corrected(transform - torch.eye(len(transform), dtype=transform.dtype), each))
    return found


def tried(
    evidence: Evidence, options: Sequence[Fit], fits: dict[int, Fit], tokens: Tokens, *, relative: bool, losses: str
) -> list[CorrectionTrial]:
    """Measure corrections of one place on text.

    Args:
        evidence: model.
        options: corrections of the same place.
        fits: earlier corrections, by their blocks.
        tokens: the text.
        relative: whether errors count relative to ‖L‖² of every token.
        losses: which corrections to measure the model's loss for, which runs the rest of the model: ``all``,
            ``nearest`` (the one with the least error, and plain removal) or ``none``.

    Raises:
        NumericalError: if no loss is finite.
    """
    errors, place = torch.zeros(len(options), dtype=torch.float64), options[0]
    with LayerReplay(evidence.view, evidence.device) as replay, guard_memory("measuring corrections", REMEDY):
        for ids, mask in evidence.batched(tokens, f"error without {_named(place)}"):
            embedded = replay.embed(ids)
            features, out = states_before(replay, embedded, place, fits)
            original = original_after(replay, embedded, out, place, fits)
            real = mask.to(out.device)
            weight = weights_of(original[real], relative=relative)
            for index, fit in enumerate(options):
                missed = weight * (original[real] - _after(features[real], out[real], fit))
                errors[index] += float(missed.square().sum(dtype=torch.float64))
    errors = errors / tokens.count
    nearest = min(range(len(options)), key=errors.tolist().__getitem__)
    measured = [
        index
        for index, fit in enumerate(options)
        if losses == "all" or (losses == "nearest" and (index == nearest or fit.step is None))
    ]
    found = dict(zip(measured, _losses(evidence, [options[i] for i in measured], fits, tokens), strict=True))
    if found and not any(map(isfinite, found.values())):
        raise NumericalError("the pruned model's loss is NaN or Inf: the model is damaged or overflows")
    return [
        CorrectionTrial(fit.run, fit.ridge, fit.step is not None, float(errors[index]), found.get(index))
        for index, fit in enumerate(options)
    ]


def best(trials: Sequence[CorrectionTrial], measure: str, gain: float = 1.0) -> int:
    """Index of the trial with the least loss or error; the first among ties.

    Args:
        trials: to choose from.
        measure: ``loss`` or ``error``.
        gain: if below 1, the first trial that achieves this share of the best trial's gain over the first trial.
    """

    def price(index: int) -> float:
        value = trials[index].loss if measure == "loss" else trials[index].error
        return inf if value is None or not isfinite(value) else value

    least = min(range(len(trials)), key=price)
    if gain == 1 or not isfinite(price(0)) or not isfinite(price(least)):
        return least
    allowed = price(0) - gain * (price(0) - price(least))
    return next((index for index in range(least) if price(index) <= allowed), least)


def _losses(evidence: Evidence, options: Sequence[Fit], fits: dict[int, Fit], tokens: Tokens) -> list[float]:
    """Mean next-token loss of the cut and corrected model for every correction of one place."""
    if not options:
        return []
    totals, predicted, place = [0.0] * len(options), 0, options[0]
    with head_replay(evidence, "measuring losses") as replay:
        for ids, mask in evidence.batched(tokens, f"loss without {_named(place)}"):
            features, out = states_before(replay, replay.embed(ids), place, fits)
            for index, fit in enumerate(options):
                hidden = through(replay, _after(features, out, fit), place.run[1], len(evidence.view.layers))
                totals[index] += summed_loss(replay.logits(ids, hidden), ids, mask)
            predicted += int(mask[:, 1:].sum())
    return [total / max(predicted, 1) for total in totals]


def _after(features: Tensor, out: Tensor, fit: Fit) -> Tensor:
    return out if fit.step is None else out + features @ fit.step.to(out)


def _named(fit: Fit) -> str:
    return f"blocks {fit.run[0]} to {fit.run[1] - 1}"
