"""How transformers reads a model some of whose decoder layers are one linear map each.

ReplaceMe's transform, where it is not folded into the block before the cut, stands in the place of the removed run as
a layer of its own: hidden ← hidden T. No stock architecture has that, so the checkpoint names a quantization method,
``cospadi_depth``, which this module registers. Without the package transformers would build an ordinary layer there,
finds a weight of one byte under the name of a matrix, and stops.

Registration may happen while transformers is half imported: nothing here may need its model classes at import time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.formats.base import NativeQuantizer, mark, register_format
from cospadi.errors import CheckpointError
from cospadi.layers.linear_block import LinearBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINEAR_BLOCKS_METHOD = "cospadi_depth"
FORMAT_VERSION = 1
_KEYS = {"name": str, "width": int, "guard": str, "extra_outputs": (int, type(None))}


class LinearBlocksConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint with linear blocks."""

    def __init__(self, **data: Any) -> None:
        """Take the JSON object as it is, after checking it.

        Raises:
            CheckpointError: if it does not describe a checkpoint that this version reads.
        """
        self.quant_method = data.get("quant_method", LINEAR_BLOCKS_METHOD)
        self.format_version = data.get("format_version")
        self.blocks: list[dict[str, Any]] = _checked(self.format_version, data.get("blocks"))


def _checked(version: object, blocks: object) -> list[dict[str, Any]]:
    where = "config.json, quantization_config"
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format version {version!r} is unknown, only {FORMAT_VERSION}: update cospadi")
    if not isinstance(blocks, list) or not blocks:
        raise CheckpointError(f"{where}: 'blocks' must be a list of linear blocks")
    for block in blocks:
        for key, kind in _KEYS.items():
            if not isinstance(block, dict) or not isinstance(block.get(key), kind):  # type: ignore[arg-type]
                raise CheckpointError(f"{where}: a linear block has no usable {key!r}; copy the checkpoint again")
    return [{key: block[key] for key in _KEYS} for block in blocks]


class LinearBlocksQuantizer(NativeQuantizer):
    """Builds linear blocks before the weights are read; see `cospadi.checkpoint.formats.factored_hf` for the hooks."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        prefix = f"{model.base_model_prefix}."
        config = self.quantization_config
        assert isinstance(config, LinearBlocksConfig)
        for block in config.blocks:
            names = (block["name"], block["name"].removeprefix(prefix), prefix + block["name"])
            known = {name for name, _ in model.named_modules()}
            name = next((name for name in names if name in known), None)
            if name is None or block["guard"] not in dict(model.get_submodule(name).named_parameters()):
                raise CheckpointError(
                    f"config.json, quantization_config: the model has no layer {block['name']} with a "
                    f"{block['guard']}; config.json belongs to another model"
                )
            with torch.device("meta"):
                made = LinearBlock(block["width"], block["guard"], block["extra_outputs"], dtype=dtype)
            model.set_submodule(name, made)
            block["name"] = name  # saved again, the tensors have the names that the modules have here
        return model


def register_linear_blocks() -> None:
    """Make transformers know the format. May be called any number of times."""
    register_format(LINEAR_BLOCKS_METHOD, LinearBlocksConfig, LinearBlocksQuantizer)


def attach_linear_blocks(model: PreTrainedModel) -> None:
    """Mark a model that has linear blocks, so that plain ``save_pretrained`` writes a checkpoint that loads."""
    register_linear_blocks()
    blocks = [
        {"name": name, "width": m.width, "guard": m.guard, "extra_outputs": m.extra_outputs}
        for name, m in model.named_modules()
        if isinstance(m, LinearBlock)
    ]
    config = LinearBlocksConfig(format_version=FORMAT_VERSION, blocks=blocks)
    mark(model, LINEAR_BLOCKS_METHOD, config, LinearBlocksQuantizer)
