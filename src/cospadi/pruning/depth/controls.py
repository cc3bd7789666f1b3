"""Controls: what a method has to beat."""

import torch

from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import Evidence


@pruning_method("magnitude", paper="Shortened LLaMA, arXiv 2402.02834, criterion 'magnitude'")
def magnitude(evidence: Evidence, blocks: int) -> Cut:
    """Remove the blocks whose weights are smallest: Σ |w| over the matrices of a block.

    Args:
        evidence: model; the text is not used.
        blocks: how many go.
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


@pruning_method("random")
def random(evidence: Evidence, blocks: int) -> Cut:
    """Remove blocks drawn at random by the seed; a smaller cut is part of every larger one.

    Args:
        evidence: model and seed; the text is not used.
        blocks: how many go.
    """
    order = torch.randperm(len(evidence.view.layers), generator=torch.Generator().manual_seed(evidence.seed))
    return Cut(tuple(sorted(order[:blocks].tolist())), told={"measure": "none"})
