"""ShortGPT (arXiv 2403.03853): remove the blocks of least influence, wherever they are."""

import torch

from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import Evidence


@pruning_method("shortgpt", paper="arXiv 2403.03853")
def shortgpt(evidence: Evidence, blocks: int) -> Cut:
    """Remove the blocks of least influence in one shot.

    The influence of block i is BI_i = 1 − E_t cos(x_i, x_{i+1}), where x_i is its input (equation 1).

    Args:
        evidence: model and text.
        blocks: number of blocks to remove.
    """
    influence = evidence.pairs.cosine.diagonal(1)
    lowest = torch.argsort(influence, stable=True)[:blocks]
    return Cut(
        tuple(sorted(lowest.tolist())),
        told={"measure": "block influence", "scores": [float(value) for value in influence]},
    )
