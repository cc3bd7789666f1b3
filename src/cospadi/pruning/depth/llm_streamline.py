"""LLM-Streamline (arXiv 2403.19135): its choice of layers, without the small network that it trains to replace them."""

from typing import Annotated

from pydantic import Field

from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.distances import chosen_run, require_run
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import Evidence


@pruning_method("llm_streamline", paper="arXiv 2403.19135")
def llm_streamline(evidence: Evidence, blocks: int, *, start: Annotated[int, Field(ge=0)] | None = None) -> Cut:
    """Remove the run of blocks over which the hidden states of all tokens rotate least.

    Removes the run l … l+n-1 with the highest E_t cos(x_l, x_{l+n}), where x_l is the input of block l (equation 3).

    Args:
        evidence: model and text.
        blocks: number of blocks to remove.
        start: the first block of the run, instead of choosing one.

    Raises:
        RecipeError: if the run would extend past the last block.
    """
    require_run(len(evidence.view.layers), blocks, start)
    first = chosen_run(evidence.pairs.cosine, blocks, start)
    distance = float(evidence.pairs.cosine[first, first + blocks])
    return Cut(
        tuple(range(first, first + blocks)),
        told={"measure": "mean cosine distance over all tokens", "distance": distance},
    )
