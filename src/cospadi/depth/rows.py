"""The rows that a transform of ReplaceMe is fitted on, streamed into sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cospadi.depth.branch import Branch, find_branch
from cospadi.depth.evidence import REMEDY, Evidence, Tokens
from cospadi.depth.normal_equations import NormalEquations, Sums
from cospadi.depth.transform import Structure, held_out_ridge
from cospadi.model_view import LayerReplay, guard_memory

LONE_RIDGE = 1e-2


@dataclass(frozen=True)
class Fit:
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


def stream_rows(
    evidence: Evidence,
    run: tuple[int, int],
    fits: dict[int, Fit],
    *,
    separate: bool,
    relative: bool,
    keep: int = 0,
    tokens: Tokens | None = None,
) -> tuple[Rows, Branch | None]:
    """Stream M of block run[0]-1 and R = L − Y through the sums (M the hidden state and Y = 0 if separate).

    Args:
        evidence: model and text.
        run: that goes, (first block, one past the last).
        fits: transforms of earlier runs, by the block that each stands after.
        separate: whether the transform maps the whole hidden state.
        relative: whether every token counts by 1/‖L‖².
        keep: so many tokens' rows are kept, drawn by the seed.
        tokens: the text, where it is not the whole of the evidence's.

    Returns:
        rows, and the branch that the transform can be folded into (None if separate).
    """
    tokens = tokens or evidence.tokens
    view, (start, stop) = evidence.view, run
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    with LayerReplay(view, evidence.device) as replay, guard_memory(f"fitting block {start - 1}", REMEDY):
        branch = None if separate else find_branch(view, start - 1, replay)
        sums: tuple[Sums, Sums] | None = None
        sequences = 0
        draw = _drawn(tokens.count, keep, evidence.seed)
        place = 0
        for ids, mask in evidence.batched(tokens, f"blocks {start} to {stop - 1}"):
            embedded = replay.embed(ids)
            m, y = states_before(replay, embedded, start, fits, branch)
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


def states_before(
    replay: LayerReplay, hidden: Tensor, start: int, fits: dict[int, Fit], branch: Branch | None
) -> tuple[Tensor, Tensor]:
    """M and Y before the run, in the model with the transforms of earlier runs.

    Args:
        replay: of the original model.
        hidden: input of the first block.
        start: first block of the run.
        fits: transforms of earlier runs, by the block that each stands after.
        branch: of block start-1; None: M is the hidden state and Y zero.
    """
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
