"""LaCo (arXiv 2402.11187): blocks are collapsed into the block before them."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from cospadi.errors import BudgetError, ModelError
from cospadi.model_view import LayerReplay, ModelView
from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import REMEDY, Evidence, Tokens
from cospadi.runtime.memory import guard_memory

Merges = tuple[tuple[int, int], ...]
"""Collapses (first, one past the last): block `first` takes the others in. In the order in which they were made."""

_HALVINGS = 12


@pruning_method("laco", paper="arXiv 2402.11187")
def laco(
    evidence: Evidence,
    blocks: int,
    *,
    merge: Annotated[int, Field(ge=2)] = 4,
    interval: Annotated[int, Field(ge=1)] = 2,
    lowest: Annotated[int, Field(ge=0)] = 1,
    samples: Annotated[int, Field(ge=1)] = 10,
) -> Cut:
    """Collapse runs of blocks from the top down wherever the output hardly turns.

    A collapse of blocks l … l+m gives block l the weights θ_l + Σ_k (θ_{l+k} − θ_l) (equations 1, 2). The sweep
    (algorithm 1) goes from the last blocks to the first and accepts a collapse if the mean cosine of the last token's
    final hidden state with that of the original model stays above a threshold; after one it goes on `interval` blocks
    further down (where these do not exist, at the last block but one; published: `merge` blocks from the end). Here
    the number of blocks is given: the threshold is the highest, by bisection, at which so many blocks go, and the last
    collapse takes what is left.

    Args:
        evidence: model and text.
        blocks: how many go.
        merge: at most so many neighbouring blocks become one (C; published: 4 to 6).
        interval: so many blocks down after a collapse (I; published: 2).
        lowest: blocks before this one are left alone (L; published: 1).
        samples: the first so many calibration sequences (published: 10 sentences).

    Raises:
        BudgetError: if no threshold removes so many blocks.
        ModelError: if blocks have different shapes.
    """
    _require_alike(evidence.view)
    sweep = _Sweep(evidence, blocks, merge, interval, lowest, evidence.tokens.first(samples))
    low, high = -1.0, 1.0
    best = sweep.run(low)
    if best is None:
        raise BudgetError(
            f"laco cannot remove {blocks} of {len(evidence.view.layers)} blocks with merge={merge}, "
            f"interval={interval}, lowest={lowest}: give a smaller interval or a larger merge"
        )
    threshold = low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = sweep.run(middle)
        if found is None:
            high = middle
        else:
            low, best, threshold = middle, found, middle
    removed = sorted(index for first, stop in best for index in range(first + 1, stop))
    return Cut(
        tuple(removed),
        merged_weights(evidence.view, best),
        told={
            "measure": "cosine of the last token's final hidden state",
            "similarity": sweep.similarity(best),
            "threshold": threshold,
            "collapsed": [list(range(first, stop)) for first, stop in sorted(best)],
        },
    )


def merged_weights(view: ModelView, merges: Merges) -> dict[str, Tensor]:
    """θ_l + Σ_k (θ_{l+k} − θ_l) of every collapsed block, float32, by parameter name."""
    found: dict[str, Tensor] = {}
    for first, stop in merges:
        parts = [dict(layer.named_parameters()) for layer in view.layers[first:stop]]
        for name, own in parts[0].items():
            base = own.detach().float()
            found[f"{view.layers_name}.{first}.{name}"] = sum((p[name].detach().float() for p in parts[1:]), base) - (
                base * (len(parts) - 1)
            )
    return found


def _require_alike(view: ModelView) -> None:
    shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in view.layers]
    odd = next((index for index, found in enumerate(shapes) if found != shapes[0]), None)
    if odd is not None:
        raise ModelError(
            f"laco adds blocks up, but block {odd} has other shapes than block 0: choose another pruning method"
        )


class _Sweep:
    """Algorithm 1 at several thresholds; what was measured once is not measured again."""

    def __init__(self, evidence: Evidence, blocks: int, merge: int, interval: int, lowest: int, tokens: Tokens) -> None:
        self.evidence, self.blocks = evidence, blocks
        self.merge, self.interval, self.lowest, self.tokens = merge, interval, lowest, tokens
        self.count = len(evidence.view.layers)
        # Similarities do not depend on how many blocks shall go: sizes share them.
        self.known: dict[frozenset[tuple[int, int]], float] = evidence.memo.setdefault(f"laco {len(tokens.ids)}", {})

    def run(self, threshold: float) -> Merges | None:
        """The collapses at a threshold; None if they do not remove enough."""
        merges: list[tuple[int, int]] = []
        alive = list(range(self.count))
        place = len(alive) - self.merge
        while place >= self.lowest:
            left = self.blocks - sum(stop - first - 1 for first, stop in merges)
            taken = min(self.merge - 1, len(alive) - 1 - place, left)
            collapse = self._collapse(merges, alive, place, taken)
            if collapse is not None and self.similarity(tuple(collapse)) > threshold:
                merges = collapse
                del alive[place + 1 : place + 1 + taken]
                if taken == left:
                    return tuple(merges)
                place = min(place - self.interval, len(alive) - 2)
            else:
                place -= 1
        return None

    def _collapse(
        self, merges: list[tuple[int, int]], alive: list[int], place: int, taken: int
    ) -> list[tuple[int, int]] | None:
        """The collapses so far and one more; None where it would take in a block that is collapsed already."""
        if taken < 1:
            return None
        first, last = alive[place], alive[place + taken]
        if any(first <= old[0] <= last for old in merges):
            return None
        return [*merges, (first, last + 1)]

    def similarity(self, merges: Merges) -> float:
        """Mean cosine of the last real token's final hidden state, before and after."""
        key = frozenset(merges)
        if key not in self.known:
            self.known[key] = self._measure(merges)
        return self.known[key]

    def _measure(self, merges: Merges) -> float:
        view = self.evidence.view
        weights = merged_weights(view, merges)
        gone = {index for first, stop in merges for index in range(first + 1, stop)}
        total = 0.0
        with LayerReplay(view, self.evidence.device) as replay, guard_memory("collapsing blocks", REMEDY):
            for ids, mask in self.evidence.batched(self.tokens, f"collapse {len(self.known) + 1}"):
                plain = merged = replay.embed(ids)
                for index in range(self.count):
                    plain = replay.layer(index, plain)
                for index in range(self.count):
                    if index not in gone:
                        merged = _run(replay, index, merged, weights)
                rows, last = torch.arange(len(ids)), mask.sum(1) - 1
                before, after = plain[rows, last].float(), merged[rows, last].float()
                total += float(functional.cosine_similarity(before, after, dim=-1).sum())
        return total / len(self.tokens.ids)


def _run(replay: LayerReplay, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Run a block with other weights, if there are any for it."""
    prefix = f"{replay.view.layers_name}.{index}."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if not own:
        return replay.layer(index, hidden)
    layer = replay.fetch(index)
    held = {name: parameter.data for name, parameter in layer.named_parameters()}
    try:
        for name, parameter in layer.named_parameters():
            parameter.data = own[name].to(parameter)
        return replay.layer(index, hidden)
    finally:
        for name, parameter in layer.named_parameters():
            parameter.data = held[name]
