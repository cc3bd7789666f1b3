"""LaCo (arXiv 2402.11187): collapse runs of blocks into their first block."""

import warnings
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
"""Collapsed runs (first, one past the last), in the order of the sweep: block `first` absorbs the others."""

_HALVINGS = 12
LARGEST_MERGE = 6
"""The search for `merge` ends here; published are 4 to 6."""
LOW_SIMILARITY = 0.45
"""The lowest threshold in the authors' code. Below it the pruned model has little in common with the original."""


@pruning_method("laco", paper="arXiv 2402.11187")
def laco(
    evidence: Evidence,
    blocks: int,
    *,
    merge: Annotated[int, Field(ge=2)] | None = None,
    interval: Annotated[int, Field(ge=1)] = 2,
    lowest: Annotated[int, Field(ge=0)] = 1,
    samples: Annotated[int, Field(ge=1)] = 10,
) -> Cut:
    """Collapse runs of blocks, from the top down, where the model's output changes least.

    Collapsing blocks l … l+m gives block l the weights θ_l + Σ_k (θ_{l+k} − θ_l) (equations 1 and 2). The sweep
    (algorithm 1) moves from the last blocks to the first. It accepts a collapse if the mean cosine similarity between
    the last token's final hidden states in the pruned and in the original model stays above a threshold; it then
    continues `interval` blocks further down, or else one block further down.

    The paper fixes the threshold; here the number of blocks is given. Bisection finds the highest threshold at which
    that many blocks go, and the last collapse takes only as many blocks as are left to remove. The paper also fixes the
    size of a collapse, C = 4 to 6 for models of 32 to 40 blocks (``merge=4`` is the published setting). In a shallow
    model, a collapse of that size can be the only choice, however much it changes the output: with ``merge=4``, 2 of 9
    blocks leave room for a single collapse of three blocks. By default `merge` is therefore searched from 2 to 6, and
    the result of highest similarity wins. A similarity below 0.45, the lowest threshold in the authors' code, raises a
    warning.

    Deviations from the authors' code: it compares the flattened hidden states of all tokens of a sentence, not of the
    last token. It lets a collapse absorb blocks that are the result of an earlier one, which adds up differences of
    differences; here overlapping collapses are refused, and the sweep moves on. Where a collapse leaves fewer blocks
    above than `interval` assumes, the sweep continues at the last block but one, there at `merge` blocks from the end.

    Args:
        evidence: model and text.
        blocks: number of blocks to remove.
        merge: largest number of consecutive blocks that become one (C; published: 4 to 6). Left out: searched.
        interval: distance to the next candidate after a collapse (I; published: 2).
        lowest: blocks below this one are left alone (L; published: 1).
        samples: number of calibration sequences, from the first (published: 10 sentences).

    Raises:
        BudgetError: if no threshold removes that many blocks.
        ModelError: if blocks have different shapes.
    """
    _require_alike(evidence.view)
    outputs = _Outputs(evidence, evidence.tokens.first(samples))
    sizes = range(2, min(blocks + 1, LARGEST_MERGE) + 1) if merge is None else (merge,)
    found = {size: best for size in sizes if (best := _highest(_Sweep(outputs, blocks, size, interval, lowest)))}
    if not found:
        raise BudgetError(
            f"laco cannot remove {blocks} of {len(evidence.view.layers)} blocks with merge={_named(merge)}, "
            f"interval={interval}, lowest={lowest}: use a smaller interval or a larger merge"
        )
    size = max(found, key=lambda each: outputs.similarity(found[each][0]))
    merges, threshold = found[size]
    similarity = outputs.similarity(merges)
    if similarity < LOW_SIMILARITY:
        remedy = "remove fewer blocks" if merge is None else "leave out merge, remove fewer blocks"
        warnings.warn(
            f"laco: the pruned model's output has a cosine similarity of only {similarity:.2f} to the original's; "
            f"expect poor quality: {remedy} or use another method",
            stacklevel=2,
        )
    return Cut(
        tuple(sorted(index for first, stop in merges for index in range(first + 1, stop))),
        merged_weights(evidence.view, merges),
        told={
            "measure": "cosine similarity of the last token's final hidden state",
            "similarity": similarity,
            "threshold": threshold,
            "merge": size,
            "collapsed": [list(range(first, stop)) for first, stop in sorted(merges)],
        },
    )


def _named(merge: int | None) -> str:
    return f"2 to {LARGEST_MERGE}" if merge is None else str(merge)


def merged_weights(view: ModelView, merges: Merges) -> dict[str, Tensor]:
    """θ_l + Σ_k (θ_{l+k} − θ_l) of every collapsed run, float32, by parameter name."""
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


class _Outputs:
    """Final hidden states of the collapsed model against those of the original; each result is computed once.

    Similarities do not depend on the number of blocks to remove, so all sizes share them through the evidence's memo.

    Args:
        evidence: of the model.
        tokens: the text.
    """

    def __init__(self, evidence: Evidence, tokens: Tokens) -> None:
        self.evidence, self.tokens = evidence, tokens
        self.count = len(evidence.view.layers)
        key = f"laco {len(tokens.ids)}"
        self._known: dict[frozenset[tuple[int, int]], float] = evidence.memo.setdefault(key, {})
        self._originals: list[Tensor] = evidence.memo.setdefault(f"{key} originals", [])

    def similarity(self, merges: Merges) -> float:
        """Mean cosine similarity of the last real token's final hidden state before and after the collapses."""
        key = frozenset(merges)
        if key not in self._known:
            if not self._originals:
                self._originals.append(self._final((), "original output"))
            after = self._final(merges, f"collapse {len(self._known) + 1}")
            total = functional.cosine_similarity(self._originals[0], after, dim=-1).sum()
            self._known[key] = float(total) / len(self.tokens.ids)
        return self._known[key]

    def _final(self, merges: Merges, phase: str) -> Tensor:
        """Final hidden states of the last real tokens (sequences, width), float32, on the CPU."""
        view = self.evidence.view
        weights = merged_weights(view, merges)
        gone = {index for first, stop in merges for index in range(first + 1, stop)}
        found = []
        with LayerReplay(view, self.evidence.device) as replay, guard_memory("collapsing blocks", REMEDY):
            for ids, mask in self.evidence.batched(self.tokens, phase):
                hidden = replay.embed(ids)
                for index in range(self.count):
                    if index not in gone:
                        hidden = _run(replay, index, hidden, weights)
                found.append(hidden[torch.arange(len(ids)), mask.sum(1) - 1].float().cpu())
        return torch.cat(found)


class _Sweep:
    """Algorithm 1 for one size of collapse."""

    def __init__(self, outputs: _Outputs, blocks: int, merge: int, interval: int, lowest: int) -> None:
        self.outputs, self.blocks = outputs, blocks
        self.merge, self.interval, self.lowest = merge, interval, lowest

    def run(self, threshold: float) -> Merges | None:
        """The collapses at a threshold; None if they remove too few blocks."""
        merges: list[tuple[int, int]] = []
        alive = list(range(self.outputs.count))
        place = len(alive) - self.merge
        while place >= self.lowest:
            left = self.blocks - sum(stop - first - 1 for first, stop in merges)
            taken = min(self.merge - 1, len(alive) - 1 - place, left)
            collapse = self._collapse(merges, alive, place, taken)
            if collapse is not None and self.outputs.similarity(tuple(collapse)) > threshold:
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
        """The collapses so far and one more; None where it would overlap an earlier one."""
        if taken < 1:
            return None
        first, last = alive[place], alive[place + taken]
        if any(first <= old[0] <= last for old in merges):
            return None
        return [*merges, (first, last + 1)]


def _highest(sweep: _Sweep) -> tuple[Merges, float] | None:
    """The collapses at the highest threshold that removes enough blocks, and that threshold; None if none does."""
    low, high = -1.0, 1.0
    best = sweep.run(low)
    if best is None:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = sweep.run(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return best, low


def _run(replay: LayerReplay, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Run a block, with other weights if there are any for it."""
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
