"""Where a correction is written, and the rows that it is fitted on, streamed into sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cospadi.model_view import LayerReplay
from cospadi.pruning.depth.replaceme.branch import Branch, find_branch
from cospadi.pruning.depth.replaceme.normal_equations import NormalEquations, Sums
from cospadi.pruning.evidence import REMEDY, Evidence, Tokens
from cospadi.runtime.memory import guard_memory

Fold = Literal["down", "transform"]


@dataclass(frozen=True)
class Fit:
    """A run to remove and the correction of the block before it, which outputs `out` + f D instead of `out`.

    Attributes:
        run: (first block, one past the last); block ``run[0] - 1`` is corrected.
        branch: the layer that takes the correction; None: the hidden state is transformed by a block of its own.
        fold: what f is. ``down``: the input of the branch's last layer; ``transform``: its output (D = T − I), or the
            hidden state if there is no branch.
        step: D, float64 (features, width); None: no correction.
        ridge: that D was solved with; None if not by least squares.
    """

    run: tuple[int, int]
    branch: Branch | None
    fold: Fold
    step: Tensor | None = None
    ridge: float | None = None

    def corrected(self, step: Tensor | None, ridge: float | None) -> Fit:
        """The same place with another correction."""
        return replace(self, step=step, ridge=ridge)


@dataclass
class Rows:
    """Sums over the rows of M and R and, for the cosine solver, a random part of the rows (tokens, width), bfloat16."""

    equations: NormalEquations
    inputs: Tensor | None
    targets: Tensor | None


def place(evidence: Evidence, run: tuple[int, int], fold: Fold, *, separate: bool) -> Fit:
    """Where the correction of a run goes, still without one.

    Args:
        evidence: model and text.
        run: the run to remove, (first block, one past the last).
        fold: see :class:`Fit`.
        separate: whether the transform becomes a block of its own.

    Raises:
        ModelError: if nothing can be folded into the block before the run.
    """
    if separate:
        return Fit(run, None, fold)
    with LayerReplay(evidence.view, evidence.device) as replay:
        return Fit(run, find_branch(evidence.view, run[0] - 1, replay), fold)


def stream_rows(
    evidence: Evidence, fit: Fit, fits: dict[int, Fit], tokens: Tokens, *, relative: bool, keep: int = 0
) -> Rows:
    """Stream the rows that a correction is fitted on into sums.

    M are the features f. R is the original stream after the run minus the output of the block, plus the features in
    case of a transform, so that D (``down``) or T (``transform``) minimises ‖M · − R‖².

    Args:
        evidence: model and text.
        fit: the place.
        fits: earlier corrections, by their blocks.
        tokens: the text.
        relative: whether to weight every token by 1/‖L‖², where L is the original stream after the run.
        keep: number of tokens whose rows are kept, drawn with the seed.
    """
    view, (start, stop) = evidence.view, fit.run
    sums: Sums | None = None
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    draw = _drawn(tokens.count, keep, evidence.seed)
    done = 0
    with LayerReplay(view, evidence.device) as replay, guard_memory(f"fitting block {start - 1}", REMEDY):
        for ids, mask in evidence.batched(tokens, f"blocks {start} to {stop - 1}"):
            embedded = replay.embed(ids)
            features, out = states_before(replay, embedded, fit, fits)
            original = original_after(replay, embedded, out, fit, fits)
            real = mask.to(out.device)
            m, lacking = features[real], (original - out)[real]
            if fit.fold == "transform":
                lacking = lacking + m
            weight = weights_of(original[real], relative=relative)
            sums = sums or Sums(m.shape[-1], replay.device, lacking.shape[-1])
            sums.add(weight * m, weight * lacking)
            if keep:
                chosen = draw[done : done + len(m)].to(m.device)
                inputs.append(m[chosen].to(torch.bfloat16))
                targets.append(lacking[chosen].to(torch.bfloat16))
            done += len(m)
    assert sums is not None
    kept = (torch.cat(inputs), torch.cat(targets)) if keep else (None, None)
    return Rows(sums.finish(f"block {start - 1}"), *kept)


def weights_of(hidden: Tensor, *, relative: bool) -> Tensor:
    """1/‖L‖ of every token (…, 1) in float32 or wider, 1 where a state is zero; or 1 everywhere."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    if not relative:
        return torch.ones_like(wide[..., :1])
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0).reciprocal()


def _drawn(count: int, keep: int, seed: int) -> Tensor:
    """A mask of `keep` of `count` tokens."""
    mask = torch.zeros(count, dtype=torch.bool)
    if keep:
        mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:keep]] = True
    return mask


def states_before(replay: LayerReplay, hidden: Tensor, fit: Fit, fits: dict[int, Fit]) -> tuple[Tensor, Tensor]:
    """Features and output of the block before a run, uncorrected, in the model with earlier corrections.

    Args:
        replay: of the original model.
        hidden: input of the first block.
        fit: the place.
        fits: earlier corrections, by their blocks.
    """
    index, last = 0, fit.run[0] - 1
    while index < last:
        earlier = fits.get(index)
        if earlier is None:
            hidden = replay.layer(index, hidden)
            index += 1
            continue
        features, hidden = _run(replay, hidden, earlier)
        if earlier.step is not None:
            hidden = hidden + features @ earlier.step.to(hidden)
        index = earlier.run[1]
    return _run(replay, hidden, fit)


def _run(replay: LayerReplay, hidden: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    if fit.branch is None:
        out = replay.layer(fit.run[0] - 1, hidden)
        return out, out
    out, features = fit.branch.run(replay, hidden, of_inputs=fit.fold == "down")
    return features, out


def original_after(replay: LayerReplay, hidden: Tensor, out: Tensor, fit: Fit, fits: dict[int, Fit]) -> Tensor:
    """The original stream after a run.

    Args:
        replay: of the original model.
        hidden: input of the first block.
        out: output of the block before the run; the original stream at that depth if there are no earlier corrections.
        fit: the place.
        fits: earlier corrections, by their blocks.
    """
    return through(replay, hidden, 0, fit.run[1]) if fits else through(replay, out, *fit.run)


def through(replay: LayerReplay, hidden: Tensor, first: int, last: int) -> Tensor:
    """Output of the original blocks first … last-1."""
    for index in range(first, last):
        hidden = replay.layer(index, hidden)
    return hidden
