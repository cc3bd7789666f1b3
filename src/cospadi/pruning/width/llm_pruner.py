"""LLM-Pruner (arXiv 2305.11627): cut the attention heads and MLP channels with the least effect on the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cospadi.checkpoint.formats.width import attach_width
from cospadi.errors import BudgetError, CalibrationError, ModelError, NumericalError
from cospadi.model_view import ModelView, discover, require_predictions
from cospadi.pruning.base import block_bytes, pruning_method
from cospadi.pruning.evidence import REMEDY, Evidence, Tokens
from cospadi.pruning.width.linear import linear_of
from cospadi.pruning.width.residual import probe_ids
from cospadi.pruning.width.units import Units, block_units, describe_in_config
from cospadi.runtime.devices import placed
from cospadi.runtime.memory import guard_memory

Taylor = Literal["vectorize", "param_first", "param_second", "param_mix"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the calibration loss by full name of the linear layer; float32 (d_out, d_in), on the device.

    Attributes:
        first: mean over sequences of ∂ℓ/∂W, where ℓ is the mean next-token loss of a sequence.
        squared: mean over sequences of (∂ℓ/∂W)², the diagonal of the Fisher information; empty if not requested.
    """

    first: dict[str, Tensor]
    squared: dict[str, Tensor]


@dataclass(frozen=True)
class Narrowing:
    """The edit of LLM-Pruner.

    Attributes:
        heads: kept head groups of each block, in order.
        channels: kept MLP channels of each block, in order.
        told: plain data for the report.
    """

    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]
    told: dict[str, Any]

    @torch.no_grad()
    def apply(self, view: ModelView) -> PreTrainedModel:
        """Cut the rows and columns. If all blocks are cut alike, the result is a stock checkpoint.

        The pruned model must match, on a few tokens, the original one with the cut structures silenced.

        Raises:
            ModelError: if the structures of this architecture are not independent. The model is then no longer usable.
        """
        units = block_units(discover(view.model))
        expected = silenced_logits(view, units, self.heads, self.channels)
        for layer, unit, heads, channels in zip(view.layers, units, self.heads, self.channels, strict=True):
            unit.attention.cut(layer, heads)
            unit.mlp.cut(layer, channels)
        describe_in_config(view.model, units, self.heads, self.channels)
        try:
            found = _logits(view)
        except RuntimeError as error:  # the attention hard-codes a shape
            raise _not_independent(view, str(error).splitlines()[0]) from error
        tolerance = 1e-4 if found.dtype.itemsize >= 4 else 5e-2
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise _not_independent(view, "the pruned model does not compute what the original computes without them")
        return attach_width(view.model)

    def facts(self) -> dict[str, Any]:
        """See :class:`cospadi.pruning.base.Edit`."""
        return {"removed": [], **self.told}


def _not_independent(view: ModelView, why: str) -> ModelError:
    return ModelError(
        f"{type(view.model).__name__}: its attention heads or MLP channels are not independent ({why}); "
        "choose another pruning method"
    )


@pruning_method("llm_pruner", paper="arXiv 2305.11627", unit="share")
def llm_pruner(
    evidence: Evidence,
    keep: float,
    *,
    taylor: Taylor = "param_first",
    sequences: Annotated[int, Field(ge=1)] = 10,
    leave_first: Annotated[int, Field(ge=0)] | None = None,
    leave_last: Annotated[int, Field(ge=0)] | None = None,
) -> Narrowing:
    """Cut the attention heads and MLP channels with the least effect on the model's loss.

    Heads that share keys and values are cut together. All pruned blocks of one size are cut alike, see
    :func:`sizes_for`.

    Args:
        evidence: of the model.
        keep: share of the blocks' 16-bit bytes to keep.
        taylor: importance of a structure with weights w and gradients g: ``vectorize`` |Σ w g|; ``param_first``
            Σ |w g|; ``param_second`` Σ w² F; ``param_mix`` Σ |w g − w² F / 2|, where F is the mean squared gradient.
        sequences: number of calibration sequences for the gradients (published: 10).
        leave_first: number of blocks at the beginning to leave alone; None: 4 of 32, as published.
        leave_last: number of blocks at the end to leave alone; None: 2 of 32, as published.

    Raises:
        BudgetError: if the share cannot be reached, or all blocks are left alone.
        ModelError: if the blocks have no separate heads and channels.
    """
    require_predictions(evidence.view.model, "llm_pruner", "use --method magnitude or a depth method")
    view = discover(evidence.view.model)
    units = block_units(view)
    count = len(units)
    first = round(count * 4 / 32) if leave_first is None else leave_first
    last = round(count * 2 / 32) if leave_last is None else leave_last
    if first + last >= count:
        raise BudgetError(
            f"leaving the first {first} and the last {last} of {count} blocks alone leaves none to prune: lower "
            "leave_first or leave_last"
        )
    pruned = range(first, count - last)
    sizes = sizes_for(view, units, pruned, keep)
    scores = _scores(evidence, view, units, pruned, taylor, sequences)
    heads = [tuple(range(unit.attention.count)) for unit in units]
    channels = [tuple(range(unit.mlp.count)) for unit in units]
    for index, (head_scores, channel_scores) in zip(pruned, scores, strict=True):
        heads[index] = largest(head_scores, sizes[index][0])
        channels[index] = largest(channel_scores, sizes[index][1])
    told = {
        "head_groups": [len(kept) for kept in heads],
        "channels": [len(kept) for kept in channels],
        "bytes": _bytes(view, units, dict(sizes)),
        "sequences": min(sequences, len(evidence.tokens.ids)),
    }
    return Narrowing(tuple(heads), tuple(channels), told)


def largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest scores, ascending; the first among ties."""
    return tuple(sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist()))


def _bytes(view: ModelView, units: Sequence[Units], sizes: dict[int, tuple[int, int]]) -> int:
    total = 0
    for index, (layer, unit) in enumerate(zip(view.layers, units, strict=True)):
        heads, channels = sizes.get(index, (unit.attention.count, unit.mlp.count))
        total += block_bytes(layer) - (unit.attention.count - heads) * unit.attention.bytes_each(layer)
        total -= (unit.mlp.count - channels) * unit.mlp.bytes_each(layer)
    return total


def sizes_for(
    view: ModelView, units: Sequence[Units], pruned: Sequence[int], keep: float
) -> dict[int, tuple[int, int]]:
    """The number of head groups and channels to keep in every pruned block.

    All pruned blocks keep the same share f of their bytes. They keep ⌈f · groups⌉ head groups and as many channels as
    fit, so models with few, large groups lose channels rather than half of their attention.

    Args:
        view: of the original model.
        units: of its blocks.
        pruned: indices of the blocks that may be cut.
        keep: share of all blocks' bytes.

    Returns:
        (head groups, channels) by block.

    Raises:
        BudgetError: if the share cannot be reached (names the smallest possible one).
    """
    total = sum(map(block_bytes, view.layers))
    inside = sum(block_bytes(view.layers[index]) for index in pruned)
    share = (keep * total - (total - inside)) / inside
    sizes = {}
    for index in pruned:
        layer, unit = view.layers[index], units[index]
        head, channel = unit.attention.bytes_each(layer), unit.mlp.bytes_each(layer)
        fixed = block_bytes(layer) - unit.attention.count * head - unit.mlp.count * channel
        allowed = share * block_bytes(layer) - fixed
        groups = min(unit.attention.count, max(1, math.ceil(share * unit.attention.count)))
        while groups > 1 and allowed - groups * head < channel:
            groups -= 1
        channels = min(unit.mlp.count, int((allowed - groups * head) // channel))
        if channels < 1:
            least = _bytes(view, units, dict.fromkeys(pruned, (1, 1))) / total
            raise BudgetError(
                f"keep {keep:g} is too small for method 'llm_pruner' on this model with {len(pruned)} of "
                f"{len(units)} blocks to prune: the least possible is {least:.4f}; lower leave_first or leave_last"
            )
        sizes[index] = (groups, channels)
    return sizes


def _scores(
    evidence: Evidence,
    view: ModelView,
    units: Sequence[Units],
    pruned: Sequence[int],
    taylor: Taylor,
    sequences: int,
) -> list[tuple[Tensor, Tensor]]:
    """Importance of the head groups and of the channels of every pruned block, computed once for all sizes."""
    key = f"llm_pruner {taylor} {sequences} {list(pruned)}"
    if key not in evidence.memo:
        names = [f"{view.layers_name}.{i}.{name}" for i in pruned for name in units[i].names]
        tokens = evidence.tokens.first(sequences)
        found = gradients(evidence, tokens, names, squared=taylor in ("param_second", "param_mix"))
        scores = []
        for index in pruned:
            prefix = f"{view.layers_name}.{index}."
            scores.append(
                (
                    importance(view, units[index].attention, prefix, found, taylor),
                    importance(view, units[index].mlp, prefix, found, taylor),
                )
            )
        evidence.memo[key] = scores
    result: list[tuple[Tensor, Tensor]] = evidence.memo[key]
    return result


def importance(view: ModelView, structures: Any, prefix: str, found: Gradients, taylor: Taylor) -> Tensor:
    """Importance of every structure of one kind in one block: the sum over all its weights.

    Args:
        view: of the original model.
        structures: heads or channels, see :class:`cospadi.pruning.width.units.Structures`.
        prefix: of the block's module names.
        found: gradients.
        taylor: see :func:`llm_pruner`.

    Returns:
        float64 (structures,), on the CPU.
    """
    total = torch.zeros(structures.count, dtype=torch.float64)
    for name, rows in (*((reader, True) for reader in structures.readers), (structures.writer, False)):
        gradient = found.first[prefix + name]
        weight = linear_of(view.model, prefix + name).weight.detach().to(gradient)
        change = weight * gradient
        if taylor in ("param_second", "param_mix"):
            curvature = weight.square() * found.squared[prefix + name]
            change = curvature if taylor == "param_second" else change - curvature / 2
        if taylor != "vectorize":
            change = change.abs()
        each = change.sum(1 if rows else 0, dtype=torch.float64).view(structures.count, -1)
        total += each.sum(1).cpu()
    return total.abs()


def gradients(evidence: Evidence, tokens: Tokens, names: Sequence[str], *, squared: bool) -> Gradients:
    """Gradients of the mean next-token loss with respect to some weights.

    The whole model runs on the device in float32, one sequence at a time. It is unchanged afterwards.

    Args:
        evidence: of the model.
        tokens: sequences of at least two real tokens; padding is not predicted.
        names: of linear layers.
        squared: whether to accumulate squared gradients too.

    Raises:
        CalibrationError: if a sequence has no token to predict.
        NumericalError: on NaN or Inf in a gradient (names the layer).
        ResourceError: if there is not enough memory.
    """
    model = evidence.view.model
    if any(int(real.sum()) < 2 for _, real in tokens.batches(1)):
        raise CalibrationError("a calibration sequence of one token has nothing to predict: use a longer --seq-len")
    with guard_memory("computing gradients", REMEDY), placed(model, evidence.device, torch.float32):
        with _watched(model, names, squared) as sums:
            for done, (ids, real) in enumerate(tokens.batches(1), 1):
                sequence = ids[real].to(evidence.device)
                logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                functional.cross_entropy(wide, sequence[1:]).backward()  # type: ignore[no-untyped-call]
                evidence.progress("calibrate", done, len(tokens.ids), "gradients")
        for table in (sums.first, sums.squared):
            for name, total in table.items():
                total /= len(tokens.ids)
                if not bool(total.isfinite().all()):
                    raise NumericalError(f"{name}: NaN or Inf in the gradient of the loss")
        return sums


@contextmanager
def _watched(model: PreTrainedModel, names: Sequence[str], squared: bool) -> Iterator[Gradients]:
    """Sum the gradients of some weights during backward passes, then restore the model."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = {name: linear_of(model, name).weight for name in names}
    sums = Gradients({}, {})
    model.train(False)
    with ExitStack() as stack, torch.enable_grad():
        try:
            model.requires_grad_(False)
            for name, weight in weights.items():
                sums.first[name] = torch.zeros_like(weight, requires_grad=False)
                if squared:
                    sums.squared[name] = torch.zeros_like(weight, requires_grad=False)

                def add(parameter: Tensor, _name: str = name) -> None:
                    assert parameter.grad is not None
                    sums.first[_name] += parameter.grad
                    if squared:
                        sums.squared[_name].addcmul_(parameter.grad, parameter.grad)
                    parameter.grad = None

                weight.requires_grad_(True)
                stack.callback(weight.register_post_accumulate_grad_hook(add).remove)  # type: ignore[no-untyped-call]
            yield sums
        finally:
            for parameter, flag in required.items():
                parameter.requires_grad_(flag)
                parameter.grad = None


def _logits(view: ModelView) -> Tensor:
    view.model.train(False)
    output: Tensor = view.model(input_ids=probe_ids(view), use_cache=False)[0]
    return output


@torch.no_grad()
def silenced_logits(
    view: ModelView, units: Sequence[Units], heads: Sequence[Sequence[int]], channels: Sequence[Sequence[int]]
) -> Tensor:
    """Logits of the original model on a few tokens with the inputs from all cut structures set to zero.

    Args:
        view: of the original model, which does not change.
        units: of its blocks.
        heads: kept head groups of each block.
        channels: kept channels of each block.
    """
    with ExitStack() as stack:
        for layer, unit, *kept in zip(view.layers, units, heads, channels, strict=True):
            for structures, stay in zip((unit.attention, unit.mlp), kept, strict=True):
                writer = linear_of(layer, structures.writer)
                heard = torch.zeros(structures.count, writer.in_features // structures.count)
                heard[list(stay)] = 1
                mask = heard.flatten().to(writer.weight)

                def silence(_module: nn.Module, args: tuple[Tensor, ...], _mask: Tensor = mask) -> tuple[Tensor, ...]:
                    return (args[0] * _mask, *args[1:])

                stack.callback(writer.register_forward_pre_hook(silence).remove)
        return _logits(view)
