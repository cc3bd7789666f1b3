"""Units that can be cut out of a decoder layer: attention heads with their keys and values, and MLP channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cospadi.errors import ModelError
from cospadi.model_view import ModelView, skeleton
from cospadi.pruning.configs import configs_of
from cospadi.pruning.width.linear import linear_of, replace_linear


@dataclass(frozen=True)
class Structures:
    """The coupled structures of one kind in one block: head groups, or channels.

    Structure i is the i-th of `count` equal parts of the readers' rows and of the writer's columns.

    Attributes:
        readers: dotted names within the block: queries, keys and values of the attention, or gate and up of an MLP.
        writer: dotted name of the linear layer that consumes their outputs.
        count: number of structures.
    """

    readers: tuple[str, ...]
    writer: str
    count: int

    def bytes_each(self, layer: nn.Module) -> int:
        """Bytes of one structure at 16 bits per weight."""
        rows = sum(linear_of(layer, name).weight.numel() for name in self.readers)
        return 2 * (rows + linear_of(layer, self.writer).weight.numel()) // self.count

    def cut(self, layer: nn.Module, kept: Sequence[int]) -> None:
        """Keep only some structures of a block, in place."""
        if len(kept) == self.count:
            return
        chosen = torch.tensor(list(kept))
        for name in self.readers:
            linear = linear_of(layer, name)
            rows = _members(chosen, linear.out_features // self.count).to(linear.weight.device)
            bias = None if linear.bias is None else linear.bias.detach()[rows]
            replace_linear(layer, name, linear.weight.detach()[rows], bias)
        linear = linear_of(layer, self.writer)
        columns = _members(chosen, linear.in_features // self.count).to(linear.weight.device)
        bias = None if linear.bias is None else linear.bias.detach()
        replace_linear(layer, self.writer, linear.weight.detach()[:, columns], bias)


@dataclass(frozen=True)
class Units:
    """The units of one block.

    Attributes:
        attention: groups of heads that share keys and values.
        mlp: channels.
    """

    attention: Structures
    mlp: Structures

    @property
    def names(self) -> tuple[str, ...]:
        """Names within the block of all linear layers involved."""
        return tuple(name for s in (self.attention, self.mlp) for name in (*s.readers, s.writer))


def _members(structures: Tensor, size: int) -> Tensor:
    """Indices of the rows of some structures, each of `size` consecutive rows."""
    return (structures[:, None] * size + torch.arange(size)).flatten()


def block_units(view: ModelView) -> tuple[Units, ...]:
    """Find the heads and channels of every block from the shapes of its linear layers.

    Siblings (linear layers with the same input) and the one linear layer after them form a branch. Three siblings in a
    module with a ``head_dim`` are an attention; siblings as wide as the input of the layer after them are an MLP.

    Args:
        view: with linear groups.

    Raises:
        ModelError: if a block does not consist of two such branches (for example with fused projections).
    """
    return tuple(_units(view, index) for index in range(len(view.layers)))


def _units(view: ModelView, index: int) -> Units:
    prefix = f"{view.layers_name}.{index}."
    groups = view.of_layer(index)
    found: dict[str, Structures] = {}
    for group, after in zip(groups[::2], groups[1::2], strict=False):
        readers = tuple(name.removeprefix(prefix) for name in group.modules)
        if len(after.modules) == 1:
            kind, count = _kind(view, index, readers, group.d_out, after.d_in)
            found[kind] = Structures(readers, after.modules[0].removeprefix(prefix), count)
    if len(groups) != 4 or set(found) != {"attention", "mlp"}:
        names = "; ".join(group.name.removeprefix(prefix) for group in groups)
        raise ModelError(
            f"{type(view.model).__name__}: decoder layer {index} has no attention of separate queries, keys and values "
            f"followed by an MLP (found: {names}), so its heads and channels cannot be cut; choose another method"
        )
    return Units(found["attention"], found["mlp"])


def _kind(
    view: ModelView, index: int, readers: tuple[str, ...], d_out: tuple[int, ...], middle: int
) -> tuple[str, int]:
    owner = view.layers[index].get_submodule(readers[0].rpartition(".")[0])
    head = getattr(owner, "head_dim", None)
    if isinstance(head, int) and len(readers) == 3:
        keys = min(d_out)
        whole = sorted(d_out)[:2] == [keys, keys] and max(d_out) == middle and keys % head == 0 and middle % keys == 0
        return ("attention", keys // head) if whole else ("other", 0)
    return ("mlp", middle) if set(d_out) == {middle} else ("other", 0)


def describe_in_config(
    model: PreTrainedModel, units: Sequence[Units], heads: Sequence[Sequence[int]], channels: Sequence[Sequence[int]]
) -> None:
    """Write the new sizes to the configuration, if all blocks were cut alike and the configuration can express it.

    Otherwise the configuration does not change, and loading the model needs this package.

    Args:
        model: already cut.
        units: of its blocks before the cut.
        heads: kept head groups of each block.
        channels: kept channels of each block.
    """
    shares = {(u.attention.count, len(h), u.mlp.count, len(c)) for u, h, c in zip(units, heads, channels, strict=True)}
    if len(shares) != 1:
        return
    groups_before, groups, channels_before, width = shares.pop()
    configs = configs_of(model)
    before = [dict(vars(config)) for config in configs]
    for config in configs:
        for key, value in list(vars(config).items()):
            if key == "num_attention_heads":
                config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // value
            if key in ("num_attention_heads", "num_key_value_heads") and isinstance(value, int):
                setattr(config, key, value * groups // groups_before)
            elif key in ("intermediate_size", "ffn_dim") and value == channels_before:
                setattr(config, key, width)
    if not _describes(model):
        for config, values in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(values)


def _describes(model: PreTrainedModel) -> bool:
    stock = skeleton(model.config, type(model))
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (stock, model)]
    return shapes[0] == shapes[1]
