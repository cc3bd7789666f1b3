"""Taking blocks out of a model so that what is left is an ordinary model of the same architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cospadi.checkpoint.formats.linear_blocks import attach_linear_blocks
from cospadi.errors import BudgetError, ModelError
from cospadi.layers.linear_block import LinearBlock
from cospadi.model_view import ModelView, embedding_weight, skeleton

_CHECK_TOKENS = 8
_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class Cut:
    """The edit of a depth pruning method.

    Attributes:
        removed: indices of the blocks that go, in the original model.
        weights: new values of parameters that stay, by their names in the original model, any float dtype.
        separate: (width, width) transforms that take the place of a removed run as a block of their own, by the index
            of the run's first block: hidden ← hidden T.
        told: what the method says of its choice, plain data for the report.
    """

    removed: tuple[int, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    separate: Mapping[int, Tensor] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, view: ModelView) -> PreTrainedModel:
        """Remove the blocks and write the weights, in the model's own dtype.

        Raises:
            ModelError: if the architecture's configuration cannot describe what is left.
        """
        changed = {name: view.model.get_parameter(name) for name in self.weights}
        pruned = without_blocks(view, self.removed, self.separate)
        for name, parameter in changed.items():
            with torch.no_grad():
                parameter.copy_(self.weights[name])
        return pruned.model

    def facts(self) -> dict[str, Any]:
        """See :class:`cospadi.pruning.base.Edit`."""
        added = sum(2 * transform.numel() for transform in self.separate.values())
        return {"removed": list(self.removed), "runs": runs(self.removed), "added_bytes": added, **self.told}


def runs(indices: Sequence[int]) -> list[list[int]]:
    """Stretches of neighbours, as [first, one past the last]."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index:
            found[-1][1] += 1
        else:
            found.append([index, index + 1])
    return found


def without_blocks(view: ModelView, removed: Sequence[int], separate: Mapping[int, Tensor] | None = None) -> ModelView:
    """Remove blocks from a model: modules, their indices, and everything that the configuration says per block.

    The result is compared with the whole model whose removed blocks are skipped, on a few tokens, and with a model
    built anew from the changed configuration.

    Args:
        view: of a real model or one on ``meta``; the model is changed in place.
        removed: indices of blocks.
        separate: see :class:`Cut`; such a model loads with this package only.

    Returns:
        a view of the same model without linear groups.

    Raises:
        BudgetError: if there are no such blocks, or none would be left.
        ModelError: if the architecture cannot be described without these blocks; the model is then of no use.
    """
    model, layers, separate = view.model, view.layers, separate or {}
    wrong = [index for index in removed if not 0 <= index < len(layers)]
    if wrong or len({*removed}) >= len(layers):
        raise BudgetError(f"cannot remove blocks {sorted(removed)} of {len(layers)}: at least one must stay")
    real = embedding_weight(model).device.type != "meta"
    expected = _skipping(view, removed) if real else None
    kept: list[int | None] = [index for index in range(len(layers)) if index not in removed or index in separate]
    blocks = [_replacement(view, i, separate.get(i)) for i in kept if i is not None]
    _set_indices(layers, kept)
    model.set_submodule(view.layers_name, nn.ModuleList(blocks))
    owner = model.get_submodule(view.layers_name.rpartition(".")[0])
    for config in _configs(model, owner):
        _cut_config(config, len(layers), kept, set(separate))
    _require_describable(model, view.layers_name)
    pruned = ModelView(model, view.layers_name, (), view.extra_outputs)
    if expected is not None and not torch.allclose(_logits(model), expected, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"{type(model).__name__}: its blocks compute something else when others are removed; "
            "this architecture cannot be pruned"
        )
    for i, transform in separate.items():
        block = blocks[kept.index(i)]
        assert isinstance(block, LinearBlock)
        block.set(transform)
    if separate:
        attach_linear_blocks(model)
    return pruned


def _replacement(view: ModelView, index: int, transform: Tensor | None) -> nn.Module:
    """The block itself, or a linear block (the identity, for now) that will hold a transform in its place."""
    layer = view.layers[index]
    return layer if transform is None else LinearBlock.in_place_of(layer, len(transform), view.extra_outputs)


@contextmanager
def _identity(view: ModelView, removed: Sequence[int]) -> Iterator[None]:
    layers, extra = view.layers, view.extra_outputs

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if extra is None else (hidden_states, *[None] * extra)

    try:
        for index in removed:
            layers[index].forward = skip
        yield
    finally:
        for index in removed:
            layers[index].__dict__.pop("forward", None)


def _skipping(view: ModelView, removed: Sequence[int]) -> Tensor:
    """Logits of the whole model on a few tokens, the removed blocks skipped."""
    with _identity(view, removed):
        return _logits(view.model)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    table = embedding_weight(model)
    ids = torch.arange(_CHECK_TOKENS, device=table.device)[None] % len(table)
    model.train(False)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _set_indices(layers: Sequence[nn.Module], kept: Sequence[int | None]) -> None:
    """Give every kept block its new place wherever it knows its old one (attention looks up its cache by it)."""
    for path, key in _index_attributes(layers):
        for place, old in enumerate(kept):
            if old is not None:
                setattr(layers[old].get_submodule(path), key, place)


def _index_attributes(layers: Sequence[nn.Module]) -> list[tuple[str, str]]:
    """Plain attributes that hold, in every block that has them, the block's own number."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for key, value in vars(module).items():
                if type(value) is int:
                    found.setdefault((path, key), []).append((index, value))
    return [
        place for place, pairs in found.items() if all(i == v for i, v in pairs) and (len(pairs) > 1 or pairs[0][0])
    ]


def _configs(model: PreTrainedModel, owner: nn.Module) -> list[PreTrainedConfig]:
    candidates = [getattr(owner, "config", None), model.config, model.config.get_text_config()]
    found: list[PreTrainedConfig] = []
    for config in candidates:
        if isinstance(config, PreTrainedConfig) and not any(config is other for other in found):
            found.append(config)
    return found


def _cut_config(config: PreTrainedConfig, count: int, kept: Sequence[int | None], linear: set[int]) -> None:
    """Change the number of blocks and every list that has one entry per block, or that names blocks."""
    if getattr(config, "num_hidden_layers", None) != count:
        return
    places = {old: place for place, old in enumerate(kept) if old is not None}
    for key, value in list(vars(config).items()):
        if not isinstance(value, list) or not ("layer" in key or "block" in key) or not value:
            continue
        if len(value) == count:
            # A linear block keeps no cache. It takes the kind of the block before it, so that it never is the first of
            # its kind: transformers asks the first of a kind how long the cache is.
            entries = [value[i - 1] if i in linear else value[i] for i in kept if i is not None]
            setattr(config, key, entries)
        elif all(type(item) is int and 0 <= item < count for item in value):
            setattr(config, key, [places[item] for item in value if item in places])
    config.num_hidden_layers = len(kept)


def _require_describable(model: PreTrainedModel, layers_name: str) -> None:
    """Compare blocks with those that transformers would build from the changed configuration.

    Raises:
        ModelError: naming what differs.
    """
    fresh = skeleton(model.config)
    for index, (ours, theirs) in enumerate(
        zip(model.get_submodule(layers_name).children(), fresh.get_submodule(layers_name).children(), strict=True)
    ):
        if isinstance(ours, LinearBlock):
            continue
        difference = _difference(ours, theirs)
        if difference:
            raise ModelError(
                f"{type(model).__name__}: its configuration cannot describe it without these blocks "
                f"({difference} of block {index} would change); remove others"
            )
    for name, module in fresh.named_modules():
        if name == layers_name or name.startswith(f"{layers_name}."):
            continue
        held = vars(model.get_submodule(name))
        for key, value in vars(module).items():  # the number of blocks, where the model keeps it beside the list
            if type(value) is int and held.get(key) != value:
                setattr(model.get_submodule(name), key, value)


def _difference(ours: nn.Module, theirs: nn.Module) -> str:
    """The first parameter or plain attribute in which two blocks differ; empty if there is none."""
    here, there = ({name: tuple(p.shape) for name, p in block.named_parameters()} for block in (ours, theirs))
    odd = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if odd:
        return odd[0]
    modules = dict(theirs.named_modules())
    for path, module in ours.named_modules():
        if path not in modules:
            return str(path)
        other = vars(modules[path])
        for key, value in vars(module).items():
            told = isinstance(value, _PLAIN) and key != "training" and not key.startswith("_")
            if told and other.get(key, value) != value:
                return f"{path}.{key}".lstrip(".")
    return ""
