"""Controls: baselines that every method has to beat."""

import torch

from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import Evidence


@pruning_method("magnitude", paper="Shortened LLaMA, arXiv 2402.02834, criterion 'magnitude'", text=False)
def magnitude(evidence: Evidence, blocks: int) -> Cut:
    """Remove the blocks with the smallest weights: Σ |w| over the matrices of a block.

    Args:
        evidence: model; the text is not used.
        blocks: number of blocks to remove.
    """
    scores = torch.tensor(
        [
            sum(float(p.detach().abs().sum(dtype=torch.float64)) for p in layer.parameters() if p.ndim >= 2)
            for layer in evidence.view.layers
        ],
        dtype=torch.float64,
    )
    lowest = torch.argsort(scores, stable=True)[:blocks]
    return Cut(tuple(sorted(lowest.tolist())), told={"measure": "magnitude", "scores": scores.tolist()})


@pruning_method("random", text=False)
def random(evidence: Evidence, blocks: int) -> Cut:
    """Remove random blocks, drawn with the seed; every smaller cut is part of the larger ones.

    Args:
        evidence: model and seed; the text is not used.
        blocks: number of blocks to remove.
    """
    order = torch.randperm(len(evidence.view.layers), generator=torch.Generator().manual_seed(evidence.seed))
    return Cut(tuple(sorted(order[:blocks].tolist())), told={"measure": "none"})
