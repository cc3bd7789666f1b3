"""How transformers reads the formats: one configuration class and one quantizer, which delegate to the format.

Only stable hooks are used: `_process_model_before_weight_loading`, `_process_model_after_weight_loading`,
`is_serializable`, `is_trainable`, `is_qat_trainable`, `is_compileable`, `_dequantize`. All others appeared, disappeared
or changed their signature between transformers 4.57 and 5.23.

Registration may happen while transformers is half imported, so nothing here may need its model classes at import time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.formats.base import FORMATS, Format, format_for, format_of
from cospadi.checkpoint.headers import Entry, read_header
from cospadi.checkpoint.tensor_names import save_under_module_names, save_under_released_names
from cospadi.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FormatConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint of any registered format; its attributes are the JSON keys."""

    def __init__(self, **data: Any) -> None:
        """Take the JSON object as it is, after checking it.

        Raises:
            CheckpointError: if it does not describe a checkpoint that this version reads.
        """
        found = _known(data)
        found.parse(data)
        self.__dict__.update(found.normalised(data))

    @property
    def dequantize(self) -> bool:
        """Whether to load the model as an ordinary dense one; transformers asks by this name."""
        return bool(self.__dict__.get("compose"))


class FormatQuantizer(HfQuantizer):
    """Builds the modules of a format before the weights are read, and finishes them afterwards.

    Its models save, train and compile like any other.
    """

    requires_calibration = True  # made by a command of the package, not on the fly while a dense model is loaded

    def __init__(self, config: FormatConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._format = _known(config)
        self._entries: dict[str, Entry] = {}
        self._stored: Sequence[Any] = ()
        self._here: Sequence[Any] = ()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        data = self.quantization_config.to_dict()
        specs = self._format.parse(data)
        self._entries, directory = _headers_of(kwargs)
        if directory is not None:
            self._format.check_headers(self._entries, specs, directory)
        here = self._format.named_as_in(model, specs)
        self._stored, here = self._format.within(model, specs, here)
        self._format.replace(model, here, dtype if isinstance(dtype, torch.dtype) else None)
        self._here = here
        if here != specs:  # saved again, the tensors will have the names that the modules have here
            self.quantization_config = FormatConfig(**(data | self._format.describe(here)))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if getattr(self.quantization_config, "dequantize", False):
            self._format.dense(model)
        else:
            self._format.finish(model, self._stored, self._here, self._entries)
            save_under_module_names(model)
        self._entries, self._stored, self._here = {}, (), ()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> PreTrainedModel:
        if self._format.not_stock:
            raise NotImplementedError(f"{self._format.name} cannot be dequantized: {self._format.not_stock}")
        self._format.dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.config._is_quantized = False
        save_under_released_names(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` may be called: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model, or adapters on top of it, may be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the stored numbers themselves may be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` may be used."""
        return True


def _known(description: Any) -> Format[Any]:
    found = format_of(description)
    if found is None:
        raise CheckpointError("config.json: quantization_config is not of a registered checkpoint format")
    return found


def _headers_of(kwargs: Mapping[str, Any]) -> tuple[dict[str, Entry], Path | None]:
    """Headers of the files that transformers is about to read, and their directory.

    Not every version of transformers says which files these are; where it does, damage is named early.
    """
    files = [Path(file) for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= read_header(file)
    return entries, files[0].parent if files else None


def register() -> None:
    """Make transformers know every registered format. May be called any number of times."""
    for name in FORMATS.all():
        if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(name)(FormatConfig)
        if name not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(name)(FormatQuantizer)


def attach(model: PreTrainedModel, specs: Sequence[Any]) -> None:
    """Mark a model whose modules were replaced as one of a format, as if it had been loaded.

    Afterwards plain ``model.save_pretrained`` writes a complete checkpoint.

    Args:
        model: its modules are already those of the format.
        specs: all of them.

    Raises:
        CheckpointError: if the specs do not make a valid description.
    """
    register()
    found = format_for(specs)
    found.place_guard(model, specs)
    config = FormatConfig(**found.describe(specs))
    model.config.quantization_config = config
    model.config._is_quantized = True
    marks = {
        "hf_quantizer": FormatQuantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": found.name,
    }
    for key, value in marks.items():
        setattr(model, key, value)
    save_under_module_names(model)
