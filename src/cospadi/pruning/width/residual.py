"""Which layers read and write the residual stream, and whether its basis may change.

Rotating the residual stream does not change a model's output if only linear layers behind a normalisation read the
stream and only outputs of linear layers are added to it. A recorded forward pass on a few tokens decides; the model's
name does not matter.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import ModelError
from cospadi.layers.sliced import BlockParts
from cospadi.model_view import ModelView, embedding_weight

_PROBE_TOKENS = 6
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class Norm:
    """A normalisation ``(x [− mean x]) / sqrt(mean x² + eps) · gain + shift``.

    Attributes:
        gain: (d,).
        shift: (d,), or None.
        eps: added to the mean square.
        centred: whether the mean of x is subtracted first (LayerNorm).
    """

    gain: Tensor
    shift: Tensor | None
    eps: float
    centred: bool


@dataclass(frozen=True)
class Sublayer:
    """One of the two residual branches of a block.

    Attributes:
        readers: dotted names, within the block, of the linear layers that read the normalised stream.
        writer: dotted name, within the block, of the linear layer whose output is added to the stream.
    """

    readers: tuple[str, ...]
    writer: str


@dataclass(frozen=True)
class ResidualBlock:
    """A pre-norm decoder layer in its parts."""

    parts: BlockParts
    mixer: Sublayer
    mlp: Sublayer


@dataclass
class _Call:
    module: str
    hidden: Tensor | None
    kwargs: dict[str, Any]
    out: Any

    @property
    def result(self) -> Any:
        return self.out[0] if isinstance(self.out, tuple) else self.out


def residual_blocks(view: ModelView) -> tuple[ResidualBlock, ...]:
    """Describe every decoder layer of a model by its parts.

    Args:
        view: of a real model, which does not change.

    Returns:
        one description per decoder layer.

    Raises:
        ModelError: if a layer is not ``x + attention(norm(x))`` followed by ``x + mlp(norm(x))``, if something other
            than a linear layer reads or writes the stream, or if the stream does not start with the embedding as it is.
    """
    model = view.model
    if view.extra_outputs is not None:
        raise _refusal(view, "its decoder layers return more than hidden states")
    prefix = f"{view.layers_name}."
    names = [name for name, _ in view.model.named_modules() if name.startswith(prefix)]
    entry = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    calls = _record(view, [entry, *names])
    if type(model.get_input_embeddings()) is not nn.Embedding:
        raise _refusal(view, "its embedding is not a plain nn.Embedding")
    blocks = []
    for index in range(len(view.layers)):
        name = f"{prefix}{index}"
        inside = [call for call in calls if call.module.startswith(f"{name}.")]
        block = _take_apart(view, index, next(c for c in calls if c.module == name), inside)
        blocks.append(block)
    first = next(call for call in calls if call.module == f"{prefix}0")
    if first.hidden is not next(call for call in calls if call.module == entry).out:
        raise _refusal(view, "the embedding is processed before the first decoder layer")
    if any(norm_of(view.layers[i], b.parts.mixer_norm).centred for i, b in enumerate(blocks)):
        _require_centred_end(view)
    return tuple(blocks)


def _refusal(view: ModelView, why: str) -> ModelError:
    return ModelError(
        f"{type(view.model).__name__}: {why}, so its residual stream cannot be rotated and sliced; "
        "choose another pruning method"
    )


def probe_ids(view: ModelView) -> Tensor:
    """A few different tokens (1, length), on the device of the embedding."""
    table = embedding_weight(view.model)
    step = max(1, len(table) // _PROBE_TOKENS)
    return (torch.arange(_PROBE_TOKENS, device=table.device)[None] * step) % len(table)


@torch.no_grad()
def _record(view: ModelView, watched: list[str]) -> list[_Call]:
    """Every call of the watched modules in one forward pass, in the order in which the calls return."""
    calls: list[_Call] = []
    view.model.train(False)
    with ExitStack() as stack:
        for name in watched:

            def note(_module: nn.Module, args: Any, kwargs: Any, out: Any, _name: str = name) -> None:
                hidden = args[0] if args else kwargs.get("hidden_states")
                rest = {f"argument {i}": a for i, a in enumerate(args[1:], 1)}
                rest |= {key: value for key, value in kwargs.items() if key != "hidden_states"}
                calls.append(_Call(_name, hidden if isinstance(hidden, Tensor) else None, rest, out))

            stack.callback(view.module(name).register_forward_hook(note, with_kwargs=True).remove)
        view.model(input_ids=probe_ids(view), use_cache=True)
    return calls


def _take_apart(view: ModelView, index: int, whole: _Call, inside: list[_Call]) -> ResidualBlock:
    name = f"{view.layers_name}.{index}"
    depth = name.count(".") + 1
    # a dropout with p = 0 has no effect even in training
    children = [call for call in inside if call.module.count(".") == depth and not _idle(view.module(call.module))]
    if len(children) != 4:
        found = ", ".join(call.module.rpartition(".")[2] for call in children)
        raise _refusal(view, f"decoder layer {index} is not norm, attention, norm, MLP (it calls {found})")
    first, mixer, second, mlp = children
    chained = (
        first.hidden is whole.hidden
        and mixer.hidden is first.out
        and mlp.hidden is second.out
        and whole.hidden is not None
        and second.hidden is not None
        and torch.equal(second.hidden, whole.hidden + mixer.result)
        and torch.equal(whole.result, second.hidden + mlp.result)
    )
    if not chained:
        raise _refusal(view, f"decoder layer {index} is not x + attention(norm(x)) followed by x + mlp(norm(x))")
    given, received = ({k: v for k, v in call.kwargs.items() if v is not None} for call in (whole, mixer))
    if given.keys() != received.keys() or any(given[key] is not received[key] for key in given) or mlp.kwargs:
        raise _refusal(view, f"decoder layer {index} changes the arguments of its attention")
    layer = view.layers[index]
    for call in (first, second):
        norm_of(layer, call.module.rpartition(".")[2])
    sublayers = [_sublayer(view, name, part, norm, inside) for part, norm in ((mixer, first), (mlp, second))]
    parts = BlockParts(*(call.module.rpartition(".")[2] for call in children))
    return ResidualBlock(parts, *sublayers)


def _idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0


def _sublayer(view: ModelView, block: str, part: _Call, norm: _Call, inside: list[_Call]) -> Sublayer:
    linears = [
        call
        for call in inside
        if call.module.startswith(f"{part.module}.") and isinstance(view.module(call.module), nn.Linear)
    ]
    readers = [call for call in linears if call.hidden is norm.out]
    writers = [call for call in linears if call.out is part.result]
    if not readers or len(writers) != 1 or writers[0] in readers:
        raise _refusal(view, f"{part.module} does not begin and end with linear layers")
    if not _only_read_by(view, part, readers):
        raise _refusal(view, f"{part.module} uses its input for more than its linear layers")
    cut = len(block) + 1
    return Sublayer(tuple(call.module[cut:] for call in readers), writers[0].module[cut:])


@torch.no_grad()
def _only_read_by(view: ModelView, part: _Call, readers: list[_Call]) -> bool:
    """Whether a module's output stays the same for another input as long as its readers return the same."""
    kwargs = {key: None if "past" in key or "cache" in key else value for key, value in part.kwargs.items()}
    assert part.hidden is not None
    outs: list[Tensor] = []
    with ExitStack() as stack:
        for call in readers:

            def answer(_module: nn.Module, _args: Any, _out: Any, _given: Tensor = call.out) -> Tensor:
                return _given

            stack.callback(view.module(call.module).register_forward_hook(answer).remove)
        for hidden in (part.hidden, part.hidden.flip(-1) * 2 + 1):
            out = view.module(part.module)(hidden, **kwargs)
            outs.append(out[0] if isinstance(out, tuple) else out)
    return torch.equal(*outs)


def norm_of(block: nn.Module, name: str) -> Norm:
    """Describe a normalisation by what it computes, not by its name.

    Args:
        block: a decoder layer.
        name: of its child.

    Raises:
        ModelError: if it is neither an RMS norm (weight w or 1 + w) nor a LayerNorm.
    """
    module = block.get_submodule(name)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((getattr(module, key) for key in _EPS_NAMES if isinstance(getattr(module, key, None), float)), None)
    if isinstance(weight, Tensor) and weight.ndim == 1 and eps is not None:
        gain, shift = weight.detach(), None if bias is None else bias.detach()
        for centred in (False, True):
            for offset in (0.0, 1.0):
                found = Norm(gain + offset, shift, eps, centred)
                if _computes(module, found):
                    return found
    raise ModelError(
        f"{name} ({type(module).__name__}) is neither an RMS norm nor a LayerNorm with a weight, so the residual "
        "stream cannot be rotated and sliced; choose another pruning method"
    )


@torch.no_grad()
def _computes(module: nn.Module, norm: Norm) -> bool:
    width, like = len(norm.gain), norm.gain
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) + 0.3
    x = (x * torch.tensor([[1.0], [1e-2], [norm.eps**0.5]])).to(like.device, like.dtype)  # eps matters in the last row
    wide = x.double()
    if norm.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.gain.double()
    if norm.shift is not None:
        expected = expected + norm.shift.double()
    tolerance = 1e-4 if like.dtype.itemsize >= 4 else 3e-2
    return torch.allclose(module(x).double(), expected, rtol=tolerance, atol=tolerance)


def _require_centred_end(view: ModelView) -> None:
    """Check that the final norm subtracts the mean too, so that the stream may lose it.

    Raises:
        ModelError: if it does not.
    """
    last, found = f"{view.layers_name}.{len(view.layers) - 1}", []
    outside = [name for name, m in view.model.named_modules() if not [*m.children()] and view.layers_name not in name]
    calls = _record(view, [last, *outside])
    end = next(call for call in calls if call.module == last).result
    found = [call.module for call in calls if call.hidden is end]
    if len(found) != 1 or not norm_of(view.model, found[0]).centred:
        raise _refusal(view, "its last norm is of another kind than the others")
