"""SliceGPT (arXiv 2401.15024): rotate the residual stream to its principal axes and cut off the last ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from cospadi.calibration import Accumulator
from cospadi.checkpoint.formats.width import attach_width
from cospadi.errors import BudgetError, ModelError
from cospadi.layers.sliced import SlicedNorm, make_sliced
from cospadi.model_view import LayerReplay, ModelView
from cospadi.pruning.base import block_bytes, pruning_method
from cospadi.pruning.evidence import BATCH_TOKENS, REMEDY, Evidence
from cospadi.pruning.width.linear import linear_of, replace_linear
from cospadi.pruning.width.residual import Norm, ResidualBlock, Sublayer, norm_of, residual_blocks
from cospadi.runtime.memory import guard_memory
from cospadi.solvers.rotation import principal_axes

STEP = 8
"""Widths are multiples of 8, as published, for the sake of tensor cores."""


@dataclass(frozen=True)
class Slicing:
    """The edit of SliceGPT.

    Attributes:
        width: of the sliced residual stream (d').
        bases: for every block, the bases Q (d, d') of the streams that enter its attention and its MLP; float64,
            orthonormal columns. After the last block the stream has its full width again, as in the authors' code.
        told: plain data for the report.
    """

    width: int
    bases: tuple[tuple[Tensor, Tensor], ...]
    told: dict[str, Any]

    @torch.no_grad()
    def apply(self, view: ModelView) -> PreTrainedModel:
        """Fuse the norms, rotate and slice every matrix, and store the result in the model's own dtype.

        Raises:
            ModelError: if the stream of this architecture cannot be rotated.
        """
        blocks = residual_blocks(view)
        leaving = [pair[0] for pair in self.bases[1:]] + [None]
        centred = _centred(view, blocks)
        for layer, block, bases, out in zip(view.layers, blocks, self.bases, leaving, strict=True):
            slice_block(layer, block, *bases, out)
        _slice_embedding(view.model, self.bases[0][0], centred)
        return attach_width(view.model)

    def facts(self) -> dict[str, Any]:
        """See :class:`cospadi.pruning.base.Edit`."""
        return {"removed": [], **self.told}


@pruning_method("slicegpt", paper="arXiv 2401.15024", unit="share")
def slicegpt(evidence: Evidence, keep: float, *, slicing: Annotated[float, Field(ge=0, lt=1)] | None = None) -> Slicing:
    """Rotate the residual stream to its principal axes, sublayer by sublayer, and cut off the last ones.

    Args:
        evidence: of the model.
        keep: share of the blocks' 16-bit bytes to keep, including the shortcut matrices.
        slicing: the authors' measure of size, the share of the stream's width to remove; None: the largest width that
            `keep` allows.

    Raises:
        BudgetError: if no width keeps so little, or `slicing` keeps more than `keep`.
        ModelError: if the stream of this architecture cannot be rotated.
    """
    view = evidence.view
    if view.model.config.get_text_config() is not view.model.config:
        raise ModelError(
            f"{type(view.model).__name__}: other parts write into the residual stream of its language model, so the "
            "stream cannot be narrowed; use a depth method"
        )
    blocks = residual_blocks(view)
    full = stream_width(view, blocks)
    total = sum(map(block_bytes, view.layers))
    if slicing is None:
        width = width_for(view, blocks, keep)
    else:
        width = sliced_width(full, slicing)
        share = sliced_bytes(view, blocks, width) / total
        if share > keep:
            raise BudgetError(f"slicing {slicing:g} leaves {share:.4f} of the blocks' bytes, more than keep {keep:g}")
    return find_bases(evidence, blocks, width)


def stream_width(view: ModelView, blocks: tuple[ResidualBlock, ...]) -> int:
    """Width d of the residual stream."""
    return len(norm_of(view.layers[0], blocks[0].parts.mixer_norm).gain)


def sliced_width(full: int, slicing: float) -> int:
    """``int((1 − s) d)`` rounded down to a multiple of 8; d for s = 0.

    Raises:
        BudgetError: if nothing would be left.
    """
    width = full if slicing == 0 else int((1 - slicing) * full) // STEP * STEP
    if width < 1:
        raise BudgetError(f"slicing {slicing:g} leaves nothing of a stream of width {full}: use a smaller slicing")
    return width


def sliced_bytes(view: ModelView, blocks: tuple[ResidualBlock, ...], width: int) -> int:
    """Bytes of the blocks' matrices at 16 bits per weight after slicing, including the shortcuts.

    Args:
        view: of the original model.
        blocks: its blocks.
        width: d'.
    """
    full = stream_width(view, blocks)
    total = 0
    for index, (layer, block) in enumerate(zip(view.layers, blocks, strict=True)):
        out = full if index + 1 == len(blocks) else width
        total += block_bytes(layer)
        for sublayer, leaves in ((block.mixer, width), (block.mlp, out)):
            for name in sublayer.readers:
                total -= 2 * (full - width) * linear_of(layer, name).out_features
            total -= 2 * (full - leaves) * linear_of(layer, sublayer.writer).in_features
            total += 2 * width * leaves
    return total


def width_for(view: ModelView, blocks: tuple[ResidualBlock, ...], keep: float) -> int:
    """The largest width, a multiple of 8 below d, that keeps at most the share `keep` of the blocks' bytes.

    Raises:
        BudgetError: if there is none (names the smallest possible share).
    """
    full, total = stream_width(view, blocks), sum(map(block_bytes, view.layers))
    for width in range((full - 1) // STEP * STEP, 0, -STEP):
        if sliced_bytes(view, blocks, width) <= keep * total:
            return width
    least = sliced_bytes(view, blocks, min(STEP, full)) / total
    raise BudgetError(
        f"keep {keep:g} is too small for method 'slicegpt' on this model: the least possible is {least:.4f}"
    )


@torch.no_grad()
def find_bases(evidence: Evidence, blocks: tuple[ResidualBlock, ...], width: int) -> Slicing:
    """The principal axes of every sublayer's normalised input, computed with all earlier sublayers already sliced.

    Args:
        evidence: of the model, which is only read; a copy of one block at a time is sliced.
        blocks: of the model.
        width: d'.

    Returns:
        the bases and, for every sublayer, the share of signal energy on the cut axes over the calibration text.

    Raises:
        NumericalError: on NaN or Inf in the stream.
        ResourceError: if there is not enough memory.
    """
    view = evidence.view
    bases: list[tuple[Tensor, Tensor]] = []
    lost: list[float] = []
    with LayerReplay(view, evidence.device) as replay, guard_memory("finding the axes to keep", REMEDY):
        size = max(1, BATCH_TOKENS // evidence.tokens.ids.shape[1])
        batches = list(evidence.tokens.batches(size))
        masks = [mask for _, mask in batches]
        stream = [_centre(replay.embed(ids), _centred(view, blocks)).cpu() for ids, _ in batches]
        for index, block in enumerate(blocks):
            evidence.progress("calibrate", index, len(blocks), "principal axes")
            layer = replay.fetch(index)
            norms = [norm_of(layer, name) for name in (block.parts.mixer_norm, block.parts.mlp_norm)]
            if index == 0:
                q, share = _axes(stream, masks, norms[0], width, f"{view.layers_name}.0", replay.device)
                lost.append(share)
            # `stream` has its full width and original basis here; each block receives it cut to its own axes
            stream = [(x.to(replay.device) @ q.to(x.dtype)).cpu() for x in stream]
            middle = [_middle(replay, index, block, q, x) for x in stream]
            q_mlp, share = _axes(middle, masks, norms[1], width, f"{view.layers_name}.{index} (MLP)", replay.device)
            lost.append(share)
            del middle
            bases.append((q.cpu(), q_mlp.cpu()))
            with _sliced_copy(replay, index, block, q, q_mlp):
                stream = [replay.layer(index, x).cpu() for x in stream]
            if index + 1 < len(blocks):
                following = norm_of(view.layers[index + 1], blocks[index + 1].parts.mixer_norm)
                q, share = _axes(stream, masks, following, width, f"{view.layers_name}.{index + 1}", replay.device)
                lost.append(share)
        evidence.progress("calibrate", len(blocks), len(blocks), "principal axes")
    told = {
        "width": width,
        "width_before": stream_width(view, blocks),
        "bytes": sliced_bytes(view, blocks, width),
        "signal_lost": lost,
    }
    return Slicing(width, tuple(bases), told)


def _axes(
    stream: list[Tensor], masks: list[Tensor], norm: Norm, width: int, name: str, device: torch.device
) -> tuple[Tensor, float]:
    """The first axes (d, d') of the normalised stream's real tokens, and the share of its energy on the others."""
    full = stream[0].shape[-1]
    moment = Accumulator(name, full, device)
    whole = SlicedNorm(full, full, norm.eps)
    for x, mask in zip(stream, masks, strict=True):
        wide = x.to(device, torch.promote_types(x.dtype, torch.float32))
        moment.add(whole(wide), mask)
    axes, energies = principal_axes(moment.finish().gram.to(device))
    return axes[:, :width], float(energies[width:].sum() / energies.sum().clamp_min(1e-300))


class _Reached(Exception):
    """Ends a block's forward once the input of its MLP is known."""


def _middle(replay: LayerReplay, index: int, block: ResidualBlock, q: Tensor, stream: Tensor) -> Tensor:
    """The stream before a block's MLP, in full width and original basis, when the block receives the sliced stream."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    with _sliced_copy(replay, index, block, q, None) as layer:
        layer.get_submodule(block.parts.mlp_norm).register_forward_pre_hook(catch)
        with suppress(_Reached):
            replay.layer(index, stream)
    return caught[0].cpu()


@contextmanager
def _sliced_copy(
    replay: LayerReplay, index: int, block: ResidualBlock, q: Tensor, q_mlp: Tensor | None
) -> Iterator[nn.Module]:
    """Run a sliced copy of a block in its place; its output is in the original basis."""
    layer = replay.fetch(index)
    stand_in = copy.deepcopy(layer)
    slice_block(stand_in, block, q, q_mlp, None)
    layer.forward = stand_in.__call__
    try:
        yield stand_in
    finally:
        del layer.forward


def slice_block(layer: nn.Module, block: ResidualBlock, q: Tensor, q_mlp: Tensor | None, q_out: Tensor | None) -> None:
    """Rotate and slice one decoder layer in place.

    Let W be stored as (outputs, inputs), g be the gain of the norm and b its shift. Readers become ``W diag(g) Q`` with
    bias ``bias + W b``. Writers become ``Qᵀ W`` with bias ``Qᵀ bias``, where Q is the basis of the stream they write
    to. The shortcut from a stream in basis Q to one in Q' is ``Q'ᵀ Q`` (SliceGPT, equations 3 to 6). In models with
    LayerNorm, the mean of the writers' outputs is removed first, which turns LayerNorm into an RMS norm.

    Args:
        layer: an original decoder layer.
        block: its parts.
        q: basis (d, d') of the stream that enters it, float64.
        q_mlp: basis of the stream that enters its MLP; None: the original one, in full width.
        q_out: basis of its output; None: the original one, in full width.
    """
    norms = norm_of(layer, block.parts.mixer_norm), norm_of(layer, block.parts.mlp_norm)
    full = len(q)
    whole = torch.eye(full, dtype=torch.float64, device=q.device)
    mlp, out = (whole if basis is None else basis for basis in (q_mlp, q_out))
    for sublayer, norm, enters, leaves in ((block.mixer, norms[0], q, mlp), (block.mlp, norms[1], mlp, out)):
        _rotate(layer, sublayer, norm, enters, leaves)
    made = tuple(SlicedNorm(b.shape[1], full, n.eps) for b, n in zip((q, mlp), norms, strict=True))
    make_sliced(layer, block.parts, (made[0], made[1]), out.shape[1])
    for shortcut, enters, leaves in ((layer.mixer_shortcut, q, mlp), (layer.mlp_shortcut, mlp, out)):
        assert isinstance(shortcut, nn.Linear)
        shortcut.weight.data.copy_(leaves.T @ enters)


def _rotate(layer: nn.Module, sublayer: Sublayer, norm: Norm, enters: Tensor, leaves: Tensor) -> None:
    for name in sublayer.readers:
        linear = linear_of(layer, name)
        weight = linear.weight.detach().double()
        bias = None if linear.bias is None else linear.bias.detach().double()
        if norm.shift is not None:
            bias = weight @ norm.shift.double() + (0 if bias is None else bias)
        replace_linear(layer, name, weight * norm.gain.double() @ enters.to(weight.device), bias)
    linear = linear_of(layer, sublayer.writer)
    weight = linear.weight.detach().double()
    bias = None if linear.bias is None else linear.bias.detach().double()
    if norm.centred:
        weight = weight - weight.mean(0)
        bias = None if bias is None else bias - bias.mean()
    turn = leaves.to(weight.device).T
    replace_linear(layer, sublayer.writer, turn @ weight, None if bias is None else turn @ bias)


def _centred(view: ModelView, blocks: tuple[ResidualBlock, ...]) -> bool:
    """Whether the model's norms subtract the mean."""
    return any(norm_of(view.layers[i], block.parts.mixer_norm).centred for i, block in enumerate(blocks))


def _centre(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x


def _slice_embedding(model: PreTrainedModel, q: Tensor, centred: bool) -> None:
    """Rotate and slice the embedding into the basis of the first block; a tied head keeps the original weight."""
    old = model.get_input_embeddings()
    assert isinstance(old, nn.Embedding)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = isinstance(head, nn.Linear) and head.weight is old.weight
    new = nn.Embedding(old.num_embeddings, q.shape[1], old.padding_idx, device="meta", dtype=old.weight.dtype)
    rows = [_centre(part.double(), centred) @ q.to(part.device) for part in torch.split(old.weight.detach(), 8192)]
    new.weight = nn.Parameter(torch.cat([part.to(old.weight.dtype) for part in rows]), old.weight.requires_grad)
    new.train(old.training)
    model.set_input_embeddings(new)
    if tied:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        kept = {a: b for a, b in ties.items() if model.get_parameter(a) is model.get_parameter(b)}
        model.all_tied_weights_keys = kept
