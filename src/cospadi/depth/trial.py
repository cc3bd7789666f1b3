"""Trying runs of blocks: the transform fitted to one half of some sequences, the model measured on the other half.

Distances between hidden states say how far a run moves them, not how much of that a linear map can make up for, nor
how much the model minds the rest. A trial measures both, on text that its transform has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.depth.evidence import REMEDY, Evidence, Tokens
from cospadi.depth.rows import Fit, states_before, stream_rows
from cospadi.depth.sleb import summed_loss
from cospadi.depth.transform import Structure, least_squares
from cospadi.errors import BudgetError, NumericalError
from cospadi.model_view import LayerReplay, guard_memory


@dataclass(frozen=True)
class Trial:
    """What a run would cost.

    Attributes:
        run: (first block, one past the last).
        loss: mean next-token loss on the held-out half.
        error: mean squared error of the transform there; relative to ‖L‖² of every token if the fit is.
    """

    run: tuple[int, int]
    loss: float
    error: float


def cheapest(distances: Tensor, blocks: int, count: int, *, first: int = 0) -> list[tuple[int, int]]:
    """The `count` nearest runs of so many blocks, the nearest first.

    Args:
        distances: (depths, depths).
        blocks: length of a run.
        count: how many; fewer if there are no more.
        first: the first block that may go.

    Raises:
        BudgetError: if no run is so short.
    """
    prices = distances.diagonal(blocks)[first:].tolist()
    if not prices:
        raise BudgetError(f"cannot remove {blocks} blocks in a row: the method keeps the first {first}")
    order = sorted(range(len(prices)), key=lambda place: (prices[place], -place))
    return [(first + place, first + place + blocks) for place in order[:count]]


def tried(
    evidence: Evidence,
    run: tuple[int, int],
    samples: int,
    structure: Structure,
    rank: int,
    ridge: float | None,
    *,
    separate: bool,
    relative: bool,
) -> Trial:
    """Fit a run's transform to every other of the first sequences, and measure it on those between.

    With a single sequence there is nothing to hold out: the fit is measured where it was made.

    Args:
        evidence: model and text.
        run: (first block, one past the last).
        samples: so many sequences in all.
        structure: of the transform.
        rank: of a low-rank one.
        ridge: see :func:`~cospadi.depth.replaceme.replaceme`.
        separate: likewise.
        relative: likewise.

    Raises:
        NumericalError: if the loss is NaN or Inf.
    """
    tokens = evidence.tokens.first(samples)
    rows, branch = stream_rows(evidence, run, {}, separate=separate, relative=relative, tokens=tokens)
    chosen = rows.ridge(structure, rank) if ridge is None else ridge
    fitted, held = rows.halves[0], rows.halves[-1]
    transform = least_squares(fitted, ridge=chosen, structure=structure, rank=rank)
    other = (
        Tokens(tokens.ids[1::2], None if tokens.lengths is None else tokens.lengths[1::2])
        if held is not fitted
        else tokens
    )
    loss = _loss_with(evidence, other, Fit(run, branch, transform, chosen, fitted))
    return Trial(run, loss, held.loss(transform))


def _loss_with(evidence: Evidence, tokens: Tokens, fit: Fit) -> float:
    """Mean next-token loss of the model with a transform in place of its run."""
    (start, stop), total, predicted = fit.run, 0.0, 0
    with LayerReplay(evidence.view, evidence.device) as replay, guard_memory("measuring losses", REMEDY):
        for ids, mask in evidence.batched(tokens, f"loss without blocks {start} to {stop - 1}"):
            m, y = states_before(replay, replay.embed(ids), start, {}, fit.branch)
            hidden = y + m @ fit.transform.to(m)
            for index in range(stop, len(evidence.view.layers)):
                hidden = replay.layer(index, hidden)
            total += summed_loss(replay.logits(ids, hidden), ids, mask)
            predicted += int(mask[:, 1:].sum())
    loss = total / max(predicted, 1)
    if not bool(torch.tensor(loss).isfinite()):
        raise NumericalError("the loss of the pruned model is NaN or Inf: the model is damaged or overflows")
    return loss
