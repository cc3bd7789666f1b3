"""Distances between the hidden states at two depths: the criterion of most depth pruning methods.

Depth 0 is the input of the first block, depth l the input of block l, the last depth the output of the last block.
Removing blocks a … b-1 connects depth a to depth b, so the distance of the pair (a, b) is the cost of that cut.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.errors import BudgetError, NumericalError, RecipeError

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class PairDistances:
    """Mean distances of all pairs of depths.

    Attributes:
        cosine: 1 − cos, mean over all real tokens; float64 (depths, depths), symmetric, zero diagonal. Its first
            off-diagonal is ShortGPT's block influence.
        angular: acos(cos)/π of the last real token of each sequence, mean over sequences (UIDL); same shape and dtype.
        tokens: number of real tokens in `cosine`.
        sequences: number of sequences in `angular`.
    """

    cosine: Tensor
    angular: Tensor
    tokens: int
    sequences: int


def pair_distances(batches: Iterable[tuple[list[Tensor], Tensor]], depths: int) -> PairDistances:
    """Stream hidden states into the mean distances of all pairs of depths; memory does not grow with the text.

    Args:
        batches: hidden states at every depth, each (b, length, width), and the mask of real tokens (b, length).
        depths: number of depths.

    Returns:
        distances. Products are float32 over at most 512 tokens (float64 for float64 states), their sums float64.

    Raises:
        NumericalError: on NaN or Inf in a real token's hidden state (names the depth).
    """
    cosines = torch.zeros(depths, depths, dtype=torch.float64)
    angles = torch.zeros(depths, depths, dtype=torch.float64)
    tokens = sequences = 0
    for states, mask in batches:
        last = mask.sum(1) - 1
        rows = torch.arange(len(last), device=mask.device)
        ends = torch.stack([functional.normalize(_wide(state[rows, last]), dim=-1) for state in states], 1)
        cosine = (ends @ ends.mT).clamp(-1, 1).to(torch.float64)
        angle = torch.acos(cosine) / torch.pi
        # rounding turns acos(1) into about 1e-4; the distance of a state to itself is zero
        angles += angle.diagonal_scatter(torch.zeros_like(cosine[..., 0]), dim1=1, dim2=2).sum(0).cpu()
        sequences += len(last)
        real = [state[mask] for state in states]
        for start in range(0, len(real[0]), CHUNK_TOKENS):
            part = torch.stack([functional.normalize(_wide(x[start : start + CHUNK_TOKENS]), dim=-1) for x in real])
            flat = part.flatten(1)
            cosines += (flat @ flat.T).to(torch.float64).cpu()
        tokens += len(real[0])
    bad = (~cosines.diagonal().isfinite()).nonzero()
    if len(bad):
        where = "the embedding" if int(bad[0]) == 0 else f"the output of block {int(bad[0]) - 1}"
        raise NumericalError(
            f"NaN or Inf in {where}: the model overflows on this text (try bfloat16 or float32 weights) or is damaged"
        )
    mean = 1 - cosines / tokens
    mean = (mean + mean.T) / 2
    return PairDistances(mean.fill_diagonal_(0.0), angles / sequences, tokens, sequences)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def chosen_run(distances: Tensor, blocks: int, start: int | None = None, first: int = 0) -> int:
    """The run of `blocks` blocks with the least distance, or the requested one.

    Args:
        distances: (depths, depths).
        blocks: length of the run.
        start: the requested first block of the run, if any.
        first: the first block that may be removed.

    Returns:
        index of its first block: `start`, or argmin over a ≥ first of distances[a, a + blocks], the deepest among ties.

    Raises:
        RecipeError: if `start` is before `first`, or the run would extend past the last block.
        BudgetError: if too few blocks may be removed.
    """
    require_run(len(distances) - 1, blocks, start, first)
    if start is not None:
        return start
    prices = distances.diagonal(blocks)[first:]
    return first + int((prices == prices.min()).nonzero()[-1])


def require_run(count: int, blocks: int, start: int | None = None, first: int = 0) -> None:
    """Check that a run can be removed. Methods call this before they read any text.

    Args:
        count: number of blocks of the model.
        blocks: length of the run.
        start: the requested first block of the run, if any.
        first: the first block that may be removed.

    Raises:
        RecipeError: if `start` is before `first`, or the run would extend past the last block.
        BudgetError: if too few blocks may be removed.
    """
    if first + blocks > count:
        raise BudgetError(f"cannot remove {blocks} of {count} blocks in a row: the method keeps the first {first}")
    if start is not None and not first <= start <= count - blocks:
        why = " (the method keeps the blocks before)" if first and start < first else ""
        raise RecipeError(
            f"start={start}: a run of {blocks} of {count} blocks starts at {first} to {count - blocks}{why}"
        )
