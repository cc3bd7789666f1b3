"""Models narrower than their configuration can say: per-layer shapes and shortcut matrices (docs/format.md).

A model whose every layer was narrowed alike is a stock checkpoint and needs none of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.checkpoint.headers import Entry, read_directory, read_json
from cospadi.errors import CheckpointError, ModelError
from cospadi.layers.sliced import BlockParts, SlicedBlock, SlicedNorm, make_sliced
from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH_METHOD = "cospadi_width"
WIDTH_VERSION = 1
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_KEYS = {"quant_method", "format_version", "linears", "embeddings", "blocks"}
_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class BlockShape:
    """A decoder layer with shortcuts.

    Attributes:
        parts: names of its children.
        widths: of the residual stream as it enters the attention, as it enters the MLP, and as it leaves.
        full_width: of the stream before slicing.
        eps: of the two norms.
    """

    parts: BlockParts
    widths: tuple[int, int, int]
    full_width: int
    eps: tuple[float, float]


@dataclass(frozen=True)
class WidthSpec:
    """Everything in which a model differs from what its configuration says, by dotted module name.

    Attributes:
        linears: linear layers of another shape, or with a bias more or less.
        embeddings: widths of embeddings of another width.
        blocks: decoder layers with shortcuts.
    """

    linears: Mapping[str, LinearShape] = field(default_factory=dict)
    embeddings: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, BlockShape] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.linears or self.embeddings or self.blocks)

    def renamed(self, rename: Callable[[str], str]) -> WidthSpec:
        """The same under other module names."""
        return replace(
            self,
            linears={rename(name): shape for name, shape in self.linears.items()},
            embeddings={rename(name): width for name, width in self.embeddings.items()},
            blocks={rename(name): shape for name, shape in self.blocks.items()},
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that differ."""
        return (*self.linears, *self.embeddings, *self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json`` under ``quantization_config``."""
        return {
            "quant_method": WIDTH_METHOD,
            "format_version": WIDTH_VERSION,
            "linears": {
                name: {"inputs": s.inputs, "outputs": s.outputs, "bias": s.bias} for name, s in self.linears.items()
            },
            "embeddings": dict(self.embeddings),
            "blocks": {
                name: {
                    "mixer_norm": s.parts.mixer_norm,
                    "mixer": s.parts.mixer,
                    "mlp_norm": s.parts.mlp_norm,
                    "mlp": s.parts.mlp,
                    "widths": list(s.widths),
                    "full_width": s.full_width,
                    "eps": list(s.eps),
                }
                for name, s in self.blocks.items()
            },
        }


def parse_width(data: Any, where: str = "config.json") -> WidthSpec:
    """Read a ``quantization_config``.

    Args:
        data: the JSON object.
        where: file, for messages.

    Raises:
        CheckpointError: if it is not ours, of an unknown version, or impossible.
    """
    if not isinstance(data, Mapping) or data.get("quant_method") != WIDTH_METHOD:
        raise CheckpointError(f"{where}: quantization_config is not of a width-pruned checkpoint")
    version = data.get("format_version")
    if version != WIDTH_VERSION or type(version) is not int:
        raise CheckpointError(
            f"{where}: format version {version!r} of {WIDTH_METHOD} is unknown (known: up to {WIDTH_VERSION}); "
            "upgrade cospadi"
        )
    unknown = set(data) - _KEYS
    if unknown:
        raise CheckpointError(f"{where}: unknown keys {sorted(unknown)} in quantization_config")
    try:
        tables = [data[key] for key in ("linears", "embeddings", "blocks")]
        for name in (name for table in tables for name in table):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no module name")
        linears, embeddings, blocks = tables
        spec = WidthSpec(
            {
                name: LinearShape(_size(s["inputs"]), _size(s["outputs"]), _exactly(bool, s["bias"]))
                for name, s in linears.items()
            },
            {name: _size(width) for name, width in embeddings.items()},
            {name: _block(s) for name, s in blocks.items()},
        )
        if not spec:
            raise ValueError("nothing differs from the configuration")
        return spec
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: quantization_config is wrong: {type(error).__name__}: {error}") from None


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no size")
    return value


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _block(data: Mapping[str, Any]) -> BlockShape:
    names = [_exactly(str, data[key]) for key in ("mixer_norm", "mixer", "mlp_norm", "mlp")]
    if not all(re.fullmatch(r"\w+", name) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"{names} are not the names of four modules")
    first, second, last = map(_size, data["widths"])
    eps = [_exactly(float, value) for value in data["eps"]]
    if len(eps) != 2 or not all(0 <= value < 1 for value in eps):
        raise ValueError(f"eps is {eps}")
    return BlockShape(BlockParts(*names), (first, second, last), _size(data["full_width"]), (eps[0], eps[1]))


def check_width_headers(entries: Mapping[str, Entry], spec: WidthSpec, where: Path) -> None:
    """Check that every tensor that the description speaks of is there with its shape and dtype.

    Args:
        entries: tensors on disk, by full name.
        spec: the description.
        where: the directory, for messages.

    Raises:
        CheckpointError: naming file and tensor.
    """
    for name, shape in spec.linears.items():
        _expect(entries, f"{name}.weight", (shape.outputs, shape.inputs), where)
        if shape.bias:
            _expect(entries, f"{name}.bias", (shape.outputs,), where)
        elif f"{name}.bias" in entries:
            raise CheckpointError(f"{entries[f'{name}.bias'].file}: tensor {name}.bias does not belong to the layer")
    for name, width in spec.embeddings.items():
        _expect(entries, f"{name}.weight", (None, width), where)
    for number, (name, block) in enumerate(spec.blocks.items()):
        first, second, last = block.widths
        _expect(entries, f"{name}.mixer_shortcut.weight", (second, first), where)
        _expect(entries, f"{name}.mlp_shortcut.weight", (last, second), where)
        if number == 0:
            _expect(entries, f"{name}.{block.parts.mixer_norm}.{GUARD}", GUARD_SHAPE, where, (GUARD_DTYPE,))


def validate_width(path: str | Path) -> WidthSpec:
    """Check description and file headers of a width-pruned checkpoint directory without building the model.

    Raises:
        CheckpointError: naming file and tensor.
    """
    directory = Path(path)
    file = directory / "config.json"
    spec = parse_width(read_json(file).get("quantization_config"), str(file))
    check_width_headers(read_directory(directory), spec, directory)
    return spec


def _expect(
    entries: Mapping[str, Entry],
    name: str,
    shape: tuple[int | None, ...],
    where: Path,
    dtypes: tuple[torch.dtype, ...] = _FLOATS,
) -> None:
    if name not in entries:
        raise CheckpointError(f"{where}: tensor {name} is missing; copy the checkpoint again")
    entry = entries[name]
    fits = len(entry.shape) == len(shape) and all(s in (None, e) for s, e in zip(shape, entry.shape, strict=True))
    if not fits or entry.dtype not in dtypes:
        wanted = [size if size is not None else "any" for size in shape]
        raise CheckpointError(
            f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, expected {dtypes[0]} {wanted}"
        )


def narrow(model: PreTrainedModel, spec: WidthSpec) -> None:
    """Give a model, built from its configuration, the shapes it has; the new tensors are unset.

    Args:
        model: changed in place; ``meta`` included.
        spec: what differs.

    Raises:
        ModelError: if a module is missing or of another kind.
    """
    for name, shape in spec.linears.items():
        old = _module(model, name, nn.Linear)
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        _put(model, name, nn.Linear(shape.inputs, shape.outputs, shape.bias, **like))
    for name, width in spec.embeddings.items():
        table = _module(model, name, nn.Embedding)
        like = {"device": table.weight.device, "dtype": table.weight.dtype}
        _put(model, name, nn.Embedding(table.num_embeddings, width, table.padding_idx, **like))
    for number, (name, block) in enumerate(spec.blocks.items()):
        layer = _module(model, name, nn.Module)
        for child in (block.parts.mixer_norm, block.parts.mixer, block.parts.mlp_norm, block.parts.mlp):
            _module(model, f"{name}.{child}", nn.Module)
        first, second, last = block.widths
        norms = (
            SlicedNorm(first, block.full_width, block.eps[0]),
            SlicedNorm(second, block.full_width, block.eps[1]),
        )
        make_sliced(layer, block.parts, norms, last)
        if number == 0:
            norms[0].add_guard(next(layer.parameters()).device)


def _module(model: nn.Module, name: str, kind: type[nn.Module]) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{name}: the model {type(model).__name__} has no such module") from None
    if not isinstance(module, kind):
        raise ModelError(f"{name}: is a {type(module).__name__}, expected {kind.__name__}")
    return module


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    module.train(model.get_submodule(name).training)
    model.set_submodule(name, module)


def describe_width(model: PreTrainedModel) -> WidthSpec:
    """In what a model differs from what transformers would build from its configuration.

    Args:
        model: with narrowed linear layers, narrowed embeddings, sliced blocks, or none of these.

    Raises:
        ModelError: if it differs in anything else.
    """
    from cospadi.model_view import skeleton  # registration must not need the model classes of transformers

    stock = {name: tuple(p.shape) for name, p in skeleton(model.config).named_parameters(remove_duplicate=False)}
    linears: dict[str, LinearShape] = {}
    embeddings: dict[str, int] = {}
    blocks: dict[str, BlockShape] = {}
    told: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, SlicedBlock):
            parts = module.parts
            norms = [getattr(module, child) for child in (parts.mixer_norm, parts.mlp_norm)]
            blocks[name] = BlockShape(
                parts,
                (norms[0].width, norms[1].width, module.mlp_shortcut.out_features),
                norms[0].full_width,
                (norms[0].eps, norms[1].eps),
            )
            inner = (parts.mixer_norm, parts.mlp_norm, "mixer_shortcut", "mlp_shortcut")
            told |= {f"{name}.{child}.{leaf}" for child in inner for leaf in ("weight", "bias")}
        elif isinstance(module, nn.Linear | nn.Embedding):
            leaves = {f"{name}.{leaf}": tuple(p.shape) for leaf, p in module.named_parameters()}
            built = {leaf: stock.get(leaf) for leaf in (f"{name}.weight", f"{name}.bias")}
            if f"{name}.weight" not in stock or all(built[leaf] == leaves.get(leaf) for leaf in built):
                continue
            told |= built.keys()
            if isinstance(module, nn.Linear):
                linears[name] = LinearShape(module.in_features, module.out_features, module.bias is not None)
            else:
                embeddings[name] = module.embedding_dim
    have = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name in sorted((have.keys() | stock.keys()) - told):
        if have.get(name) != stock.get(name):
            raise ModelError(
                f"{type(model).__name__}: {name} is {have.get(name)}, its configuration says {stock.get(name)}; "
                "such a model cannot be stored"
            )
    return WidthSpec(linears, embeddings, blocks)
