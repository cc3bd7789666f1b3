"""Finding decoder layers and linear groups by observing a forward pass; no architecture is recognised by name.

The probe runs the model's own forward on a few tokens. Every parameter and buffer is replaced by zeros that take no
memory, and every linear layer only returns zeros. The probe therefore takes a moment for any size, never reads a
weight, and works on a skeleton on ``meta`` as well as on a real model. Whatever a forward stores in its modules (rotary
frequencies for the length it saw) is taken back.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from cospadi.errors import ModelError
from cospadi.layers.computed_linear import is_dense_linear
from cospadi.model_view.view import LinearGroup, ModelView

PROBE_SHAPE = (1, 4)
LEGIBLE = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


@dataclass
class _Record:
    """What the probe observed. Tensors are kept so that their identities stay unique."""

    calls: list[tuple[str, Any, Any]] = field(default_factory=list)
    linears: list[tuple[str, Tensor]] = field(default_factory=list)


def discover(model: PreTrainedModel) -> ModelView:
    """Find the decoder layers and their linear layers, grouped by shared input.

    Args:
        model: a causal language model, real or on ``meta``.

    Returns:
        the view. Linear layers outside the decoder layers (the head) are not part of it.

    Raises:
        ModelError: if the model has no chain of decoder layers, no linear layers in them, three-dimensional weights
            (fused experts, recurrent units), linear layers that the forward does not call exactly once (experts,
            state-space layers), or weights that are already quantised.
    """
    lists = _module_lists(model)
    _refuse_stacked_weights(model)
    record = _probe(model, {f"{name}.{i}" for name, items in lists.items() for i in range(len(items))})
    layers_name, extra = _decoder_layers(model, lists, record)
    groups = _linear_groups(model, layers_name, record)
    return ModelView(model, layers_name, groups, extra)


def discover_layers(model: PreTrainedModel) -> ModelView:
    """Find only the decoder layers, whatever they contain, for methods that work on whole layers.

    Args:
        model: a causal language model, real or on ``meta``.

    Returns:
        a view without linear groups.

    Raises:
        ModelError: if the model has no chain of decoder layers.
    """
    lists = _module_lists(model)
    record = _probe(model, {f"{name}.{i}" for name, items in lists.items() for i in range(len(items))})
    layers_name, extra = _decoder_layers(model, lists, record)
    return ModelView(model, layers_name, (), extra)


def _module_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The members of every ``ModuleList``, by its name."""
    return {
        name: list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }


def _refuse_stacked_weights(model: PreTrainedModel) -> None:
    """Refuse three-dimensional weights outside convolutions: a stack of matrices that is not a linear layer."""
    # Experts in a ModuleList, which the router indexes, are noticed later as linear layers that were not called.
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Conv" in kind:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3 or parameter.shape[0] <= 1:
                continue
            if _is_expert(f"{name}.{kind}"):
                raise ModelError(
                    f"{type(model).__name__}: {name} ({kind}) holds {parameter.shape[0]} fused experts in {key!r}; "
                    "mixture-of-experts models are not supported yet"
                )
            raise ModelError(
                f"{type(model).__name__}: {name} ({kind}) holds {key!r} of shape {tuple(parameter.shape)}, a stack of "
                "matrices that is not an nn.Linear; architectures with such weights are not supported yet"
            )


def _is_expert(name: str) -> bool:
    return "expert" in name.lower() or "moe" in name.lower()


@contextmanager
def _without_arithmetic(model: nn.Module, record: _Record) -> Iterator[None]:
    """Replace the forward of every linear layer by one that records its input and returns zeros."""
    patched: list[nn.Module] = []
    try:
        for name, module in model.named_modules():
            if not is_dense_linear(module) or "forward" in module.__dict__:
                continue

            def forward(x: Tensor, *_: Any, _name: str = name, _out: int = module.out_features) -> Tensor:
                record.linears.append((_name, x))
                return x.new_zeros(*x.shape[:-1], _out)

            module.forward = forward  # type: ignore[method-assign,assignment]
            patched.append(module)
        yield
    finally:
        for module in patched:
            del module.forward


def _probe(model: PreTrainedModel, watched: set[str]) -> _Record:
    """Record the calls of some modules and of all linear layers in a forward pass."""
    record = _Record()
    with ExitStack() as stack:
        stack.enter_context(_without_arithmetic(model, record))
        for name, module in model.named_modules():
            if name in watched:

                def note(_module: nn.Module, args: Any, kwargs: Any, out: Any, _name: str = name) -> None:
                    hidden = args[0] if args else kwargs.get("hidden_states")
                    record.calls.append((_name, hidden, out))

                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        try:
            _forward(model, _zeros(model))
        except Exception as error:
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"{type(model).__name__}: a forward pass over {PROBE_SHAPE[1]} dummy tokens failed ({cause}); "
                "this architecture is not supported"
            ) from error
    return record


def _zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Zeros that take little memory, for every parameter and buffer by name; a forward may write into the buffers."""
    return {
        **{name: _shared_zeros(t) for name, t in model.named_parameters()},
        **{name: _writable_zeros(t) for name, t in model.named_buffers()},
    }


def _shared_zeros(like: Tensor) -> Tensor:
    """Zeros of a shape and dtype that are one number, or of stacks of matrices one matrix.

    Grouped products of experts require strides of real matrices.
    """
    if like.ndim < 3:
        return torch.zeros((), dtype=like.dtype).expand(like.shape)
    return _writable_zeros(like[0]).expand(like.shape)


def _writable_zeros(like: Tensor) -> Tensor:
    """Zeros of a shape and dtype that take memory only where something is written into them."""
    # numpy, unlike torch, asks the system for zeroed pages, and those are made when they are touched
    empty = np.zeros(like.numel() * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(empty).view(like.dtype).view(like.shape)


@torch.no_grad()
def _forward(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Run the model's forward on dummy tokens with other parameters and buffers."""
    training = model.training
    model.train(False)
    try:
        with _attributes_restored(model):
            inputs = {"input_ids": torch.zeros(PROBE_SHAPE, dtype=torch.long), "use_cache": False}
            functional_call(model, tensors, args=(), kwargs=inputs)
    finally:
        model.train(training)


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Take back the attributes and buffers that a forward sets; tensors that are not buffers are on the CPU meanwhile.

    A tensor that is a plain attribute of a skeleton has no numbers, and a forward may want to move it to the device
    where it runs.
    """
    kept = [
        (module, dict(vars(module)), dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    try:
        for module, attributes, _, _ in kept:
            for name, value in attributes.items():
                if isinstance(value, Tensor) and value.device.type == "meta":
                    vars(module)[name] = _writable_zeros(value)
        yield
    finally:
        for module, attributes, buffers, passing in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(passing)


class _Uses(TorchFunctionMode):
    """Notes which of some tensors enter an operation, other than to ask for their type or shape."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.watched, self.used = {id(tensor) for tensor in watched}, set[int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if attribute not in ("dtype", "device", "shape", "ndim"):
            self.used |= {id(item) for item in args} & self.watched
        return function(*args, **(kwargs or {}))


def _used_without_a_call(model: PreTrainedModel, name: str) -> bool:
    """Whether the forward multiplies by the weight of a linear layer without calling the layer."""
    tensors = _zeros(model)
    with _without_arithmetic(model, _Record()), _Uses([tensors[f"{name}.weight"]]) as uses:
        _forward(model, tensors)
    return bool(uses.used)


def _why_not_once(model: PreTrainedModel, name: str, count: int) -> str:
    """What is special about a linear layer that the forward does not call exactly once."""
    if count > 1:
        return f"{name} is called {count} times; layers that are shared are not supported yet"
    if _is_expert(name):
        return f"{name} is an expert that is called only for some tokens; mixtures of experts are not supported yet"
    if _used_without_a_call(model, name):
        return (
            f"the model uses the weight of {name} without calling the layer, as state-space layers do; such layers "
            "are not supported yet"
        )
    return f"{name} is never called; models with unused linear layers are not supported yet"


def _decoder_layers(
    model: PreTrainedModel, lists: dict[str, list[nn.Module]], record: _Record
) -> tuple[str, int | None]:
    """Name of the longest outermost list whose members were called once each, in order."""
    called = [name for name, _, _ in record.calls]
    chains = [
        name
        for name, items in lists.items()
        if [c for c in called if c.rpartition(".")[0] == name] == [f"{name}.{i}" for i in range(len(items))]
    ]
    outermost = [name for name in chains if not any(name.startswith(other + ".") for other in chains)]
    if not outermost:
        raise ModelError(
            f"{type(model).__name__}: found no list of decoder layers that the forward calls one after another"
        )
    best = max(outermost, key=lambda name: len(lists[name]))
    chain = [(hidden, out) for name, hidden, out in record.calls if name.rpartition(".")[0] == best]
    returns = {len(out) if isinstance(out, tuple) else None for _, out in chain}
    heads = [out[0] if isinstance(out, tuple) and out else out for _, out in chain]
    linked = all(isinstance(hidden, Tensor) for hidden, _ in chain) and all(
        hidden is previous for (hidden, _), previous in zip(chain[1:], heads, strict=False)
    )
    if not linked or len(returns) != 1:
        kind = type(lists[best][0]).__name__
        raise ModelError(
            f"{type(model).__name__}: its decoder layers ({kind}, {best!r}) do not feed into each other; "
            "this architecture is not supported"
        )
    length = returns.pop()
    return best, None if length is None else length - 1


def _linear_groups(model: PreTrainedModel, layers_name: str, record: _Record) -> tuple[LinearGroup, ...]:
    inside = {
        name: module
        for name, module in model.get_submodule(layers_name).named_modules(prefix=layers_name)
        if is_dense_linear(module)
    }
    architecture = type(model).__name__
    if not inside:
        kinds = Counter(type(m).__name__ for m in model.get_submodule(layers_name).modules() if not [*m.children()])
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        raise ModelError(
            f"{architecture}: no nn.Linear in the decoder layers {layers_name!r} (found: {found}); "
            "this architecture is not supported"
        )
    counts = Counter(name for name, _ in record.linears if name in inside)
    odd = [name for name in inside if counts[name] != 1]
    if odd:
        reason = _why_not_once(model, odd[0], counts[odd[0]])
        others = f" ({len(odd)} of {len(inside)} linear layers)" if len(odd) > 1 else ""
        raise ModelError(f"{architecture}: {reason}{others}")
    members: dict[tuple[int, int], list[str]] = {}
    owners: dict[int, str] = {}
    for name, x in record.linears:
        if name not in inside:
            continue
        weight = inside[name].weight
        if weight.dtype not in LEGIBLE or weight.ndim != 2:
            raise ModelError(
                f"{name} holds {weight.dtype} of shape {tuple(weight.shape)}; use a checkpoint whose weights "
                "have 16 or 32 bits and are not quantised yet"
            )
        if owners.setdefault(id(weight), name) != name:
            raise ModelError(f"{name} shares its weight with {owners[id(weight)]}; tied layers are not supported")
        index = int(name[len(layers_name) + 1 :].split(".", 1)[0])
        members.setdefault((index, id(x)), []).append(name)
    return tuple(
        LinearGroup(tuple(names), index, inside[names[0]].in_features, tuple(inside[n].out_features for n in names))
        for (index, _), names in members.items()
    )
