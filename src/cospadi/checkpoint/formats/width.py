"""``cospadi_width``: models narrower than their configuration can say (docs/format.md).

The description holds the shapes of linear layers and embeddings that differ from the configuration, and the decoder
layers that have linear maps on their residual paths (SliceGPT). A model whose layers were all narrowed alike is a stock
checkpoint and needs none of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.checkpoint.checks import check_entry, entry_of
from cospadi.checkpoint.formats.base import FORMATS, Format
from cospadi.checkpoint.formats.grouped import module_of
from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError, ModelError
from cospadi.layers import is_dense_linear
from cospadi.layers.sliced import BlockParts, SlicedBlock, SlicedNorm, make_sliced
from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class BlockShape:
    """A decoder layer with linear maps on its residual paths (shortcuts).

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
    """All differences between a model and its configuration, by dotted module name.

    Attributes:
        linears: linear layers of another shape, or with another bias.
        embeddings: widths of embeddings of another width.
        blocks: decoder layers with shortcuts.
    """

    linears: Mapping[str, LinearShape] = field(default_factory=dict)
    embeddings: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, BlockShape] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.linears or self.embeddings or self.blocks)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that differ."""
        return (*self.linears, *self.embeddings, *self.blocks)


class WidthFormat(Format[WidthSpec]):
    """Ordinary dense tensors of other shapes; one spec describes the whole model."""

    name = "cospadi_width"
    spec_type = WidthSpec
    keys = frozenset({"linears", "embeddings", "blocks"})
    not_stock = "the model is width-pruned and has no stock form; evaluate, generate and load take it as it is"

    def read_body(self, data: Mapping[str, Any], where: str) -> tuple[WidthSpec, ...]:
        """See :meth:`Format.read_body`."""
        try:
            tables = [data[key] for key in ("linears", "embeddings", "blocks")]
            for name in (name for table in tables for name in table):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{name!r} is not a module name")
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: quantization_config is wrong: {type(error).__name__}: {error}") from None
        return (spec,)

    def body(self, specs: Sequence[WidthSpec]) -> dict[str, Any]:
        """See :meth:`Format.body`."""
        (spec,) = specs
        return {
            "linears": {name: asdict(shape) for name, shape in spec.linears.items()},
            "embeddings": dict(spec.embeddings),
            "blocks": {
                name: asdict(block.parts)
                | {"widths": list(block.widths), "full_width": block.full_width, "eps": list(block.eps)}
                for name, block in spec.blocks.items()
            },
        }

    def rows(self, specs: Sequence[WidthSpec]) -> list[dict[str, Any]]:
        """One row for each narrowed linear layer and each pair of shortcuts. See :meth:`Format.rows`."""
        (spec,) = specs
        numbers = {name: shape.outputs * (shape.inputs + shape.bias) for name, shape in spec.linears.items()}
        for name, block in spec.blocks.items():
            first, second, last = block.widths
            numbers |= {f"{name}.mixer_shortcut": first * second, f"{name}.mlp_shortcut": second * last}
        return [
            {
                "name": name,
                "modules": [name],
                "method": "width",
                "atoms": None,
                "nonzeros": None,
                "pattern": "dense",
                "bits": {"dictionary": None, "values": 16},
                "bytes": 2 * count,
                "bytes_before": None,
            }
            for name, count in numbers.items()
        ]

    def renamed(self, spec: WidthSpec, rename: Callable[[str], str]) -> WidthSpec:
        """See :meth:`Format.renamed`."""
        return WidthSpec(
            {rename(name): shape for name, shape in spec.linears.items()},
            {rename(name): width for name, width in spec.embeddings.items()},
            {rename(name): block for name, block in spec.blocks.items()},
        )

    def part(self, spec: WidthSpec, kept: Sequence[int]) -> WidthSpec:
        """The narrowed layers of fewer blocks; sliced blocks end in the last one's width. See :meth:`Format.part`."""
        names = {spec.modules[index] for index in kept}
        if not names.issuperset(spec.blocks):
            return super().part(spec, kept)
        linears = {name: shape for name, shape in spec.linears.items() if name in names}
        return WidthSpec(linears, spec.embeddings, spec.blocks)

    def names(self, specs: Sequence[WidthSpec]) -> list[str]:
        """See :meth:`Format.names`."""
        return list(_wanted(specs[0]))

    def check_headers(self, entries: Mapping[str, Entry], specs: Sequence[WidthSpec], where: Path) -> None:
        """Check every tensor that the description names. See :meth:`Format.check_headers`."""
        (spec,) = specs
        for name, shape in _wanted(spec).items():
            check_entry(entry_of(entries, name, where), name, shape)
        for name, linear in spec.linears.items():
            if not linear.bias and f"{name}.bias" in entries:
                file = entries[f"{name}.bias"].file
                raise CheckpointError(f"{file}: tensor {name}.bias does not belong to the layer")
        guard = _guarded(spec)
        if guard is not None:
            check_entry(entry_of(entries, f"{guard}.{GUARD}", where), f"{guard}.{GUARD}", GUARD_SHAPE, (GUARD_DTYPE,))

    def replace(self, model: PreTrainedModel, specs: Sequence[WidthSpec], dtype: torch.dtype | None = None) -> None:
        """Build the described shapes; new tensors have the dtype of the old ones. See :meth:`Format.replace`."""
        (spec,) = specs
        for name, shape in spec.linears.items():
            old = module_of(model, name, nn.Linear)
            like = {"device": old.weight.device, "dtype": old.weight.dtype}
            _put(model, name, nn.Linear(shape.inputs, shape.outputs, shape.bias, **like))
        for name, width in spec.embeddings.items():
            table = module_of(model, name, nn.Embedding)
            like = {"device": table.weight.device, "dtype": table.weight.dtype}
            _put(model, name, nn.Embedding(table.num_embeddings, width, table.padding_idx, **like))
        for name, block in spec.blocks.items():
            layer = module_of(model, name)
            for child in asdict(block.parts).values():
                module_of(model, f"{name}.{child}")
            first, second, last = block.widths
            norms = (
                SlicedNorm(first, block.full_width, block.eps[0]),
                SlicedNorm(second, block.full_width, block.eps[1]),
            )
            make_sliced(layer, block.parts, norms, last)
        self.place_guard(model, specs)

    def place_guard(self, model: nn.Module, specs: Sequence[WidthSpec]) -> None:
        """Put the guard tensor into the first norm of the first block with shortcuts, if there is one."""
        name = _guarded(specs[0])
        if name is not None:
            norm = module_of(model, name, SlicedNorm)
            norm.add_guard(next(model.get_submodule(name.rpartition(".")[0]).parameters()).device)


WIDTH = FORMATS.add(WidthFormat.name, WidthFormat())


def _guarded(spec: WidthSpec) -> str | None:
    """Name of the norm that holds the guard."""
    return next((f"{name}.{block.parts.mixer_norm}" for name, block in spec.blocks.items()), None)


def _wanted(spec: WidthSpec) -> dict[str, tuple[int | None, ...]]:
    """Shapes of all tensors that a spec describes, the guard excluded; None is any size."""
    found: dict[str, tuple[int | None, ...]] = {}
    for name, shape in spec.linears.items():
        found[f"{name}.weight"] = (shape.outputs, shape.inputs)
        if shape.bias:
            found[f"{name}.bias"] = (shape.outputs,)
    for name, width in spec.embeddings.items():
        found[f"{name}.weight"] = (None, width)
    for name, block in spec.blocks.items():
        first, second, last = block.widths
        found[f"{name}.mixer_shortcut.weight"] = (second, first)
        found[f"{name}.mlp_shortcut.weight"] = (last, second)
    return found


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a size")
    return value


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not a {kind.__name__}")
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


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    module.train(model.get_submodule(name).training)
    model.set_submodule(name, module)


def describe_width(model: PreTrainedModel) -> WidthSpec:
    """The differences between a model and what transformers would build from its configuration.

    Args:
        model: with narrowed linear layers, narrowed embeddings, sliced blocks, or none of these.

    Raises:
        ModelError: if it differs in anything else.
    """
    from cospadi.model_view import skeleton  # registration must not need the model classes of transformers

    stock = {
        name: tuple(p.shape) for name, p in skeleton(model.config, type(model)).named_parameters(remove_duplicate=False)
    }
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
        elif is_dense_linear(module) or isinstance(module, nn.Embedding):
            leaves = {f"{name}.{leaf}": tuple(p.shape) for leaf, p in module.named_parameters()}
            built = {leaf: stock.get(leaf) for leaf in (f"{name}.weight", f"{name}.bias")}
            if f"{name}.weight" not in stock or all(built[leaf] == leaves.get(leaf) for leaf in built):
                continue
            told |= built.keys()
            if isinstance(module, nn.Embedding):
                embeddings[name] = module.embedding_dim
            elif is_dense_linear(module):
                linears[name] = LinearShape(module.in_features, module.out_features, module.bias is not None)
    have = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name in sorted((have.keys() | stock.keys()) - told):
        if have.get(name) != stock.get(name):
            raise ModelError(
                f"{type(model).__name__}: {name} is {have.get(name)}, its configuration says {stock.get(name)}; "
                "such a model cannot be stored"
            )
    return WidthSpec(linears, embeddings, blocks)


def attach_width(model: PreTrainedModel) -> PreTrainedModel:
    """Mark a narrowed model as one of this format, as if it had been loaded; a stock one stays unmarked.

    Afterwards plain ``model.save_pretrained`` writes a complete checkpoint.

    Args:
        model: its modules are narrowed already.

    Returns:
        the same model.

    Raises:
        ModelError: if it differs from its configuration in more than this format can say.
    """
    from cospadi.checkpoint.hooks import attach  # needs transformers, see `cospadi.checkpoint.formats.base`

    spec = describe_width(model)
    if spec:
        attach(model, [spec])
    return model
