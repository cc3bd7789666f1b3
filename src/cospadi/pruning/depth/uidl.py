"""The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887), without the healing afterwards."""

from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.distances import chosen_run, require_run
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import Evidence


@pruning_method("uidl", paper="arXiv 2403.17887")
def uidl(evidence: Evidence, blocks: int, *, start: int | None = None) -> Cut:
    """Remove the run of blocks over which the last token's hidden state rotates least.

    d(l, n) is the mean over sequences of acos(cos(x_l, x_{l+n})) / π, where x_l is the hidden state of the last real
    token at the input of block l. Removes the run l … l+n-1 with the least d (equation 5).

    Args:
        evidence: model and text.
        blocks: number of blocks to remove.
        start: the first block of the run, instead of choosing one.

    Raises:
        RecipeError: if the run would extend past the last block.
    """
    require_run(len(evidence.view.layers), blocks, start)
    first = chosen_run(evidence.pairs.angular, blocks, start)
    distance = float(evidence.pairs.angular[first, first + blocks])
    return Cut(
        tuple(range(first, first + blocks)),
        told={"measure": "angular distance of the last token", "distance": distance},
    )
