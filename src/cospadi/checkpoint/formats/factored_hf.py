"""How transformers reads the format: a quantization method named ``cospadi``, from stable hooks only.

Used hooks: `_process_model_before_weight_loading`, `_process_model_after_weight_loading`, `is_serializable`,
`is_trainable`, `is_qat_trainable`, `is_compileable`, `_dequantize`. All others came, went or changed their signature
between transformers 4.57 and 5.23.

Registration may happen while transformers is half imported, so neither this module nor what it imports may need the
model classes of transformers at import time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.convert import (
    place_guard,
    quantization_config,
    replace_by_dense,
    replace_modules,
)
from cospadi.checkpoint.formats.base import NativeQuantizer, headers_of, mark, register_format
from cospadi.checkpoint.formats.factored import QUANT_METHOD, FileTensors, check_group, check_headers, parse_config
from cospadi.checkpoint.formats.linear_blocks import register_linear_blocks
from cospadi.checkpoint.formats.width_hf import register_width
from cospadi.checkpoint.headers import Entry
from cospadi.format import GroupSpec
from cospadi.layers import FactoredLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CospadiConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint."""

    def __init__(self, **data: Any) -> None:
        """Take the JSON object as it is, after checking it.

        Raises:
            CheckpointError: if it does not describe a checkpoint that this version reads.
        """
        data.setdefault("quant_method", QUANT_METHOD)
        parse_config(data)
        self.quant_method = data["quant_method"]
        self.format_version: int = data["format_version"]
        self.groups: list[dict[str, Any]] = data["groups"]


class CospadiQuantizer(NativeQuantizer):
    """Builds factored layers before the weights are read, and checks and freezes them afterwards."""

    def __init__(self, config: CospadiConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._entries: dict[str, Entry] = {}
        self._groups: list[tuple[GroupSpec, GroupSpec]] = []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        groups = parse_config(self.quantization_config.to_dict())
        self._entries, directory = headers_of(kwargs)
        if directory is not None:
            check_headers(self._entries, groups, directory)
        here = _named_as_in(model, groups)
        replace_modules(model, here, dtype if isinstance(dtype, torch.dtype) else None)
        self._groups = list(zip(groups, here, strict=True))
        if tuple(here) != groups:  # saved again, the tensors will have the names that the modules have here
            self.quantization_config = CospadiConfig(**quantization_config(here))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        files = {name: entry.file for name, entry in self._entries.items()}
        for stored, here in self._groups:
            for index, name in enumerate(here.modules):
                layer = model.get_submodule(name)
                assert isinstance(layer, FactoredLinear)
                # transformers 5 makes every floating-point parameter trainable, however it was built
                for parameter in layer.factor_parameters():
                    parameter.requires_grad_(False)
                held: Mapping[str, Tensor] = {n: p for n, p in layer._parameters.items() if p is not None}
                if any(tensor.device.type == "meta" for tensor in held.values()):
                    held = FileTensors(self._entries, stored.modules[index])
                    if not self._entries:
                        continue
                check_group(stored, index, held, files)
        self._entries, self._groups = {}, []
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> PreTrainedModel:
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        replace_by_dense(model, dtype)
        model.config._is_quantized = False
        return model


def _named_as_in(model: PreTrainedModel, groups: Sequence[GroupSpec]) -> Sequence[GroupSpec]:
    """Groups under the module names of this model.

    A checkpoint of a language model may be loaded as its bare decoder (``AutoModel``), and the other way round; names
    then lack, or gain, the decoder's prefix.
    """
    known = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    candidates = (lambda name: name, lambda name: name.removeprefix(prefix), lambda name: prefix + name)
    for rename in candidates:
        renamed = [replace(group, modules=tuple(map(rename, group.modules))) for group in groups]
        if all(name in known for group in renamed for name in group.modules):
            return renamed
    return groups  # whoever uses them names the module that is missing


def register() -> None:
    """Make transformers know the formats. May be called any number of times."""
    register_width()
    register_linear_blocks()
    register_format(QUANT_METHOD, CospadiConfig, CospadiQuantizer)


def attach(model: PreTrainedModel, groups: Sequence[GroupSpec]) -> None:
    """Mark a model whose layers were replaced as one of this format, as if it had been loaded.

    Afterwards plain ``model.save_pretrained`` writes a complete checkpoint.

    Args:
        model: its modules are already factored layers.
        groups: all of them.
    """
    register()
    place_guard(model, groups)
    config = CospadiConfig(**quantization_config(groups))
    mark(model, QUANT_METHOD, config, CospadiQuantizer)
