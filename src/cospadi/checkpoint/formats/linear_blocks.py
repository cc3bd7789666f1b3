"""``cospadi_depth``: models some of whose decoder layers are one linear map each.

Where ReplaceMe's transform is not folded into the block before the cut, it replaces the removed run as a layer of its
own: hidden ← hidden T. No stock architecture has such a layer. The guard, a tensor of one byte under the name of a
matrix of the removed layer, stops a reader without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.checkpoint.checks import FLOATS, check_entry, entry_of
from cospadi.checkpoint.formats.base import FORMATS, Format
from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError
from cospadi.layers.linear_block import LinearBlock
from cospadi.layers.tensors import GUARD_DTYPE, GUARD_SHAPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "width": (int,),
    "guard": (str,),
    "extra_outputs": (int, type(None)),
}


@dataclass(frozen=True)
class LinearBlockSpec:
    """A decoder layer that is one linear map.

    Attributes:
        name: of the layer in the model.
        width: of the hidden states.
        guard: path of the guard tensor within the layer.
        extra_outputs: what the layer returns beside the hidden states; see :class:`~cospadi.model_view.ModelView`.
    """

    name: str
    width: int
    guard: str
    extra_outputs: int | None

    @property
    def modules(self) -> tuple[str, ...]:
        """The name of the layer."""
        return (self.name,)


class LinearBlocksFormat(Format[LinearBlockSpec]):
    """One dense square matrix in the place of each removed run of decoder layers."""

    name = "cospadi_depth"
    spec_type = LinearBlockSpec
    keys = frozenset({"blocks"})
    not_stock = "a decoder layer that is one linear map has no stock form; evaluate, generate and load take it as it is"

    def read_body(self, data: Mapping[str, Any], where: str) -> tuple[LinearBlockSpec, ...]:
        """See :meth:`Format.read_body`."""
        blocks = data.get("blocks")
        if not isinstance(blocks, list) or not blocks:
            raise CheckpointError(f"{where}: quantization_config has no list of linear 'blocks'")
        for block in blocks:
            for key, kinds in _TYPES.items():
                if not isinstance(block, dict) or not isinstance(block.get(key), kinds):
                    raise CheckpointError(f"{where}: a linear block of quantization_config has no usable {key!r}")
        return tuple(LinearBlockSpec(**{key: block[key] for key in _TYPES}) for block in blocks)

    def body(self, specs: Sequence[LinearBlockSpec]) -> dict[str, Any]:
        """See :meth:`Format.body`."""
        return {"blocks": [asdict(spec) for spec in specs]}

    def normalised(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Without keys of blocks that this version does not know. See :meth:`Format.normalised`."""
        return self.describe(self.parse(data))

    def rows(self, specs: Sequence[LinearBlockSpec]) -> list[dict[str, Any]]:
        """See :meth:`Format.rows`."""
        return [
            {
                "name": spec.name,
                "modules": [spec.name],
                "method": "linear block",
                "atoms": None,
                "nonzeros": None,
                "pattern": "dense",
                "bits": {"dictionary": None, "values": 16},
                "bytes": 2 * spec.width**2,
                "bytes_before": None,
            }
            for spec in specs
        ]

    def renamed(self, spec: LinearBlockSpec, rename: Callable[[str], str]) -> LinearBlockSpec:
        """See :meth:`Format.renamed`."""
        return replace(spec, name=rename(spec.name))

    def names(self, specs: Sequence[LinearBlockSpec]) -> list[str]:
        """See :meth:`Format.names`."""
        return [f"{spec.name}.weight" for spec in specs]

    def check_headers(self, entries: Mapping[str, Entry], specs: Sequence[LinearBlockSpec], where: Path) -> None:
        """See :meth:`Format.check_headers`."""
        for spec in specs:
            name, guard = f"{spec.name}.weight", f"{spec.name}.{spec.guard}"
            check_entry(entry_of(entries, name, where), name, (spec.width, spec.width), (*FLOATS, torch.float64))
            check_entry(entry_of(entries, guard, where), guard, GUARD_SHAPE, (GUARD_DTYPE,))

    def replace(
        self, model: PreTrainedModel, specs: Sequence[LinearBlockSpec], dtype: torch.dtype | None = None
    ) -> None:
        """See :meth:`Format.replace`."""
        for spec in specs:
            layers = dict(model.named_modules())
            held = dict(layers[spec.name].named_parameters()) if spec.name in layers else {}
            if spec.guard not in held:
                raise CheckpointError(
                    f"config.json, quantization_config: the model has no layer {spec.name} with a {spec.guard}; "
                    "config.json belongs to another model"
                )
            device = held[spec.guard].device
            made = LinearBlock(spec.width, spec.guard, spec.extra_outputs, device=device, dtype=dtype or model.dtype)
            model.set_submodule(spec.name, made)


LINEAR_BLOCKS = FORMATS.add(LinearBlocksFormat.name, LinearBlocksFormat())


def linear_blocks(model: nn.Module) -> list[LinearBlockSpec]:
    """Specs of all linear blocks of a model."""
    return [
        LinearBlockSpec(name, block.width, block.guard, block.extra_outputs)
        for name, block in model.named_modules()
        if isinstance(block, LinearBlock)
    ]


def attach_linear_blocks(model: PreTrainedModel) -> None:
    """Mark a model that has linear blocks, so that plain ``save_pretrained`` writes a checkpoint that loads."""
    from cospadi.checkpoint.hooks import attach  # needs transformers, see `cospadi.checkpoint.formats.base`

    attach(model, linear_blocks(model))
