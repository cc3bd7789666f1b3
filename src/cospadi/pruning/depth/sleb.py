"""SLEB (arXiv 2402.09025): greedily remove the block whose removal costs the least loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from cospadi.errors import BudgetError, NumericalError
from cospadi.model_view import LayerReplay, require_predictions
from cospadi.pruning.base import pruning_method
from cospadi.pruning.depth.surgery import Cut
from cospadi.pruning.evidence import REMEDY, Evidence, Tokens
from cospadi.runtime.devices import placed
from cospadi.runtime.memory import guard_memory

_ROWS = 4096


@pruning_method("sleb", paper="arXiv 2402.09025")
def sleb(
    evidence: Evidence,
    blocks: int,
    *,
    samples: Annotated[int, Field(ge=1)] = 16,
    first: Annotated[int, Field(ge=0)] = 1,
    last: Annotated[int, Field(ge=0)] = 1,
) -> Cut:
    """Remove blocks greedily, each time the one without which the current model has the lowest loss.

    Each remaining block between the barriers is skipped in turn, and the mean next-token loss of the model as pruned so
    far is measured (algorithm 1). Candidates share the hidden states before the skipped block.

    Args:
        evidence: model and text.
        blocks: number of blocks to remove.
        samples: number of calibration sequences, from the first (published: 128 of WikiText-2).
        first: number of blocks at the beginning that always stay (published: 1).
        last: number of blocks at the end that always stay (published: 1).

    Raises:
        BudgetError: if there are too few blocks between the barriers.
        NumericalError: if the loss is NaN or Inf.
    """
    require_predictions(evidence.view.model, "sleb", "use --method shortgpt")
    count = len(evidence.view.layers)
    if blocks > count - first - last:
        raise BudgetError(
            f"sleb cannot remove {blocks} of {count} blocks: the first {first} and the last {last} always stay "
            "(--set first=…, --set last=…)"
        )
    # Greedy orders are prefixes of each other: a larger cut continues a smaller one.
    known: list[tuple[int, float]] = evidence.memo.setdefault(f"sleb {samples} {first} {last}", [])
    tokens = evidence.tokens.first(samples)
    while len(known) < blocks:
        gone = {index for index, _ in known}
        candidates = [index for index in range(first, count - last) if index not in gone]
        losses = losses_without(evidence, tokens, gone, candidates)
        best = min(range(len(candidates)), key=losses.__getitem__)
        known.append((candidates[best], losses[best]))
    order, losses = [index for index, _ in known[:blocks]], [loss for _, loss in known[:blocks]]
    return Cut(tuple(sorted(order)), told={"measure": "loss of the pruned model", "order": order, "losses": losses})


def losses_without(evidence: Evidence, tokens: Tokens, gone: set[int], candidates: list[int]) -> list[float]:
    """Mean next-token loss of the model without the blocks `gone` and one candidate, for each candidate.

    Raises:
        NumericalError: if a loss is NaN or Inf.
    """
    alive = [index for index in range(len(evidence.view.layers)) if index not in gone]
    sums = torch.zeros(len(candidates), dtype=torch.float64)
    predicted = 0
    with head_replay(evidence, "measuring losses") as replay:
        for ids, mask in evidence.batched(tokens, f"losses without {len(gone) + 1} blocks"):
            hidden = replay.embed(ids)
            ends: dict[int, Tensor] = {}
            for index in alive:
                # Each candidate's states pass through the later blocks while those are on the device.
                ends = {candidate: replay.layer(index, state) for candidate, state in ends.items()}
                if index in candidates:
                    ends[index] = hidden
                hidden = replay.layer(index, hidden)
            for place, candidate in enumerate(candidates):
                sums[place] += summed_loss(replay.logits(ids, ends[candidate]), ids, mask)
            predicted += int(mask[:, 1:].sum())
    losses = (sums / max(predicted, 1)).tolist()
    if not all(map(torch.isfinite, torch.tensor(losses))):
        raise NumericalError("the pruned model's loss is NaN or Inf: the model is damaged or overflows")
    return [float(loss) for loss in losses]


@contextmanager
def head_replay(evidence: Evidence, doing: str) -> Iterator[LayerReplay]:
    """Replay the model with its head and everything else outside the blocks on the device, where logits dominate.

    Args:
        evidence: of the model.
        doing: the purpose, for messages.
    """
    view, device = evidence.view, evidence.device
    with (
        guard_memory(doing, REMEDY),
        placed(view.model, device, without=view.layers),
        LayerReplay(view, device) as replay,
    ):
        yield replay


def summed_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Summed negative log-likelihood of the real tokens; the first token of a sequence is not predicted."""
    real = mask[:, 1:].to(logits.device)
    rows, targets = logits[:, :-1][real], ids[:, 1:].to(logits.device)[real]
    total = 0.0
    for part, target in zip(torch.split(rows, _ROWS), torch.split(targets, _ROWS), strict=True):
        total += float(functional.cross_entropy(part.float(), target, reduction="sum"))
    return total
