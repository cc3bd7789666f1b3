"""Remove blocks from a model so that the rest is an ordinary model of the same architecture."""

from __future__ import annotations

import re
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
from cospadi.pruning.configs import configs_of

_CHECK_TOKENS = 8
_PLAIN = (int, float, str, type(None))
_PER_BLOCK = re.compile("layer|block|types|pattern|idx|indices|indexes|intermediate_size|heads")
"""Occurs in the names of configuration lists that have one entry per block, or that list block indices."""
_INDICES = re.compile("idx|indices|indexes")
_COUNTS = re.compile("(num|n)_(hidden_)?(layers|blocks)")
"""Names of numbers that may count the blocks; some configurations hold the count twice."""


@dataclass(frozen=True)
class Cut:
    """The edit of a depth pruning method.

    Attributes:
        removed: indices of the removed blocks, in the original model.
        weights: new values of parameters that stay, by their names in the original model, any float dtype.
        separate: (width, width) transforms that replace a removed run as a block of their own, by the index of the
            run's first block: hidden ← hidden T.
        told: what the method reports about its choice; plain data.
    """

    removed: tuple[int, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    separate: Mapping[int, Tensor] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, view: ModelView) -> PreTrainedModel:
        """Remove the blocks and write the weights in the model's own dtype.

        Raises:
            ModelError: if the architecture's configuration cannot describe the pruned model.
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
    """Group indices into runs of consecutive ones, each as [first, one past the last]."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index:
            found[-1][1] += 1
        else:
            found.append([index, index + 1])
    return found


def without_blocks(view: ModelView, removed: Sequence[int], separate: Mapping[int, Tensor] | None = None) -> ModelView:
    """Remove blocks from a model: the modules, their stored indices, and every per-block entry of the configuration.

    The result must match, on a few tokens, the original model with the removed blocks skipped, and its blocks must
    match those that transformers builds from the new configuration.

    Args:
        view: of a model, real or on ``meta``; the model is changed in place.
        removed: indices of blocks.
        separate: see :class:`Cut`; such a model loads with this package only.

    Returns:
        a view of the same model without linear groups.

    Raises:
        BudgetError: if a block does not exist, or none would be left.
        ModelError: if the architecture cannot be described without these blocks. The model is then no longer usable.
    """
    model, layers, separate = view.model, view.layers, separate or {}
    wrong = [index for index in removed if not 0 <= index < len(layers)]
    if wrong or len({*removed}) >= len(layers):
        raise BudgetError(f"cannot remove blocks {sorted(removed)} of {len(layers)}: at least one must stay")
    real = embedding_weight(model).device.type != "meta"
    expected = _skipping(view, removed) if real else None
    kinds = _kinds(model.config)
    kept = [index for index in range(len(layers)) if index not in removed or index in separate]
    blocks = [_replacement(view, index, separate.get(index)) for index in kept]
    _renumber(layers, kept)
    model.set_submodule(view.layers_name, nn.ModuleList(blocks))
    owner = model.get_submodule(view.layers_name.rpartition(".")[0])
    for config in configs_of(model, getattr(owner, "config", None)):
        _cut_config(config, len(layers), kept, separate)
    _require_describable(model, view.layers_name)
    pruned = ModelView(model, view.layers_name, (), view.extra_outputs)
    if expected is not None:
        _require_equal(model, expected)
        if _kinds(model.config) != kinds:
            _require_cache(model)
    for index, transform in separate.items():
        block = blocks[kept.index(index)]
        assert isinstance(block, LinearBlock)
        block.set(transform)
    if separate:
        attach_linear_blocks(model)
    return pruned


def _replacement(view: ModelView, index: int, transform: Tensor | None) -> nn.Module:
    """The block itself, or a linear block (still the identity) that will hold a transform in its place."""
    if transform is None:
        return view.layers[index]
    # The configuration gives a linear block the kind of the block before it (see `_cut_config`), so a fresh model has
    # that block's parameters there.
    return LinearBlock.in_place_of(view.layers[_kind_of_linear(index)], len(transform), view.extra_outputs)


def _kind_of_linear(index: int) -> int:
    """The block whose kind a linear block in place of block `index` takes: the one before it."""
    return max(index - 1, 0)


@contextmanager
def _identity(view: ModelView, removed: Sequence[int]) -> Iterator[None]:
    """Make some blocks return their input."""
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
    """The output of the original model on a few tokens with some blocks skipped.

    Raises:
        ModelError: if the other blocks do not run without them.
    """
    try:
        with _identity(view, removed):
            return _output(view.model)
    except Exception as error:
        raise ModelError(
            f"{type(view.model).__name__}: other blocks depend on these ({_reason(error)}); remove others"
        ) from error


@torch.no_grad()
def _output(model: PreTrainedModel, *, use_cache: bool = False) -> Tensor:
    """What the model computes of a few tokens, float32: logits, or the hidden states of a bare decoder."""
    table = embedding_weight(model)
    ids = torch.arange(_CHECK_TOKENS, device=table.device)[None] % len(table)
    model.train(False)
    output: Tensor = model(input_ids=ids, use_cache=use_cache)[0]
    return output.float()


def _renumber(layers: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Give every kept block its new index wherever it stores its old one (attention finds its cache by it)."""
    places = {old: place for place, old in enumerate(kept)}
    for index, module, key in _stored_indices(layers):
        if index in places:
            setattr(module, key, places[index])


def _stored_indices(layers: Sequence[nn.Module]) -> list[tuple[int, nn.Module, str]]:
    """(block, module, attribute) for every integer attribute that holds the index of its block.

    An attribute qualifies if it equals the index in every block that has it. Blocks of different kinds have different
    modules, so that one block may be the only one with an attribute, which may equal its index by chance. The attribute
    then qualifies only if an attribute of the same name holds the index in another block.
    """
    owners: dict[tuple[str, str], list[tuple[int, nn.Module]]] = {}
    other_values: set[tuple[str, str]] = set()
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for key, value in vars(module).items():
                if type(value) is int:
                    owners.setdefault((path, key), []).append((index, module))
                    if value != index:
                        other_values.add((path, key))
    candidates = {place: found for place, found in owners.items() if place not in other_values}
    blocks: dict[str, set[int]] = {}
    for (_, key), found in candidates.items():
        blocks.setdefault(key, set()).update(index for index, _ in found)
    return [
        (index, module, key)
        for (_, key), found in candidates.items()
        if len(blocks[key]) > 1
        for index, module in found
    ]


def _kinds(config: PreTrainedConfig) -> set[str]:
    """The kinds of blocks that a configuration lists, such as ``full_attention``; empty if it lists none."""
    return {*(getattr(config.get_text_config(), "layer_types", None) or ())}


def _cut_config(config: PreTrainedConfig, count: int, kept: Sequence[int], linear: Mapping[int, Any]) -> None:
    """Change the number of blocks, every list with one entry per block, and every list of block indices.

    Args:
        config: changed in place if it describes `count` blocks.
        count: number of blocks before the cut.
        kept: old index of every block of the pruned model.
        linear: keyed by the old indices of the blocks that a linear block replaces.
    """
    if getattr(config, "num_hidden_layers", None) != count:
        return
    places = {old: place for place, old in enumerate(kept)}
    for key, value in _per_block_lists(config).items():
        if _lists_indices(key, value, count):
            setattr(config, key, [places[item] for item in value if item in places])
        elif len(value) == count:
            # A linear block keeps no cache. It takes the kind of the block before it, so that it is never the first of
            # its kind: transformers asks the first block of a kind for the length of the cache.
            setattr(config, key, [value[_kind_of_linear(old) if old in linear else old] for old in kept])
    for key in [key for key, value in vars(config).items() if _COUNTS.fullmatch(key) and value == count]:
        setattr(config, key, len(kept))
    config.num_hidden_layers = len(kept)


def _lists_indices(key: str, value: list[Any], count: int) -> bool:
    """Whether a list names blocks by index. Otherwise, if it is long enough, it has one entry per block."""
    if not all(type(item) is int and 0 <= item < count for item in value) or len({*value}) < len(value):
        return False
    return len(value) != count or count > 2 or bool(_INDICES.search(key))  # [0, 1] may be two flags


def _require_describable(model: PreTrainedModel, layers_name: str) -> None:
    """Compare the model with the one that transformers builds from the changed configuration, stored and read again.

    Counts of blocks that the model stores outside its list of blocks are corrected.

    Raises:
        ModelError: naming the first difference.
    """
    config = _read_again(model.config)
    mine, theirs = (_per_block_lists(each.get_text_config()) for each in (model.config, config))
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise _undescribable(model, f"transformers turns {key} {value} into {theirs.get(key)}")
    fresh = skeleton(config, type(model))
    blocks, others = ([*each.get_submodule(layers_name).children()] for each in (model, fresh))
    if len(blocks) != len(others):
        raise _undescribable(model, f"transformers builds {len(others)} blocks of it, not {len(blocks)}")
    for index, (block, other) in enumerate(zip(blocks, others, strict=True)):
        difference = "" if isinstance(block, LinearBlock) else _difference(block, other)
        if difference:
            raise _undescribable(model, f"{difference} of block {index} would change")
    for name, module in fresh.named_modules():
        if name == layers_name or name.startswith(f"{layers_name}."):
            continue
        held = model.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            if held.get_parameter(key).shape != parameter.shape:
                raise _undescribable(model, f"the shape of {name}.{key} depends on the number of blocks")
        for key, value in vars(module).items():
            if type(value) is int and vars(held).get(key) != value:
                setattr(held, key, value)


def _undescribable(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: its configuration cannot describe it without these blocks ({why}); remove others"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_again(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration as it will be read from the checkpoint.

    Raises:
        ModelError: if the architecture's own checks refuse it.
    """
    try:
        return type(config).from_dict(config.to_dict())
    except Exception as error:
        raise ModelError(
            f"{type(config).__name__}: it cannot describe the model without these blocks ({_reason(error)}); "
            "remove others"
        ) from error


def _per_block_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The lists of a configuration that describe its blocks."""
    return {key: value for key, value in vars(config).items() if isinstance(value, list) and _PER_BLOCK.search(key)}


def _difference(ours: nn.Module, theirs: nn.Module) -> str:
    """The first parameter, module or plain attribute in which two blocks differ; empty if there is none."""
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


def _require_equal(model: PreTrainedModel, expected: Tensor) -> None:
    """Compare the pruned model, its linear blocks still identities, with the original one that skips blocks.

    Raises:
        ModelError: if its logits differ, or it does not run.
    """
    try:
        found = _output(model)
    except Exception as error:
        linear = any(isinstance(module, LinearBlock) for module in model.modules())
        hint = "leave out separate=true" if linear else "remove others"
        raise ModelError(
            f"{type(model).__name__}: it does not run without these blocks ({_reason(error)}); {hint}"
        ) from error
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"{type(model).__name__}: its blocks compute something else when others are removed; "
            "this architecture cannot be pruned"
        )


def _require_cache(model: PreTrainedModel) -> None:
    """Run a cached forward pass, which transformers may refuse once a kind of block is gone.

    Raises:
        ModelError: if the pass fails.
    """
    try:
        _output(model, use_cache=True)
    except Exception as error:
        left = ", ".join(sorted(_kinds(model.config)))
        raise ModelError(
            f"{type(model).__name__}: with blocks of kind {left} only, generation with a cache fails "
            f"({_reason(error)}); remove other blocks, or fewer"
        ) from error
