"""What the package's own checkpoint formats have in common where transformers reads them.

Each format is a quantization method of its own name: a configuration class, and a quantizer that builds the modules
before the weights are read. Only stable hooks of transformers are used, see `cospadi.checkpoint.formats.factored_hf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.headers import Entry, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NativeQuantizer(HfQuantizer):
    """A format whose models save, train and compile like any other."""

    requires_calibration = True  # made by a command of the package, not on the fly while a whole model is loaded

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
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


def headers_of(kwargs: Mapping[str, Any]) -> tuple[dict[str, Entry], Path | None]:
    """Headers of the files that transformers is about to read, and their directory.

    Not every version of transformers says which files these are; where it does, damage is named early.

    Args:
        kwargs: of `_process_model_before_weight_loading`.

    Returns:
        tensors by name and the directory; nothing and None where it is not said.
    """
    files = [Path(file) for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= read_header(file)
    return entries, files[0].parent if files else None


def register_format(name: str, config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer]) -> None:
    """Make transformers know a format. May be called any number of times."""
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config)
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(quantizer)


def mark(model: PreTrainedModel, name: str, config: QuantizationConfigMixin, quantizer: type[HfQuantizer]) -> None:
    """Mark a model as one of a format, as if it had been loaded: plain ``save_pretrained`` then writes it whole.

    Args:
        model: its modules are those of the format already.
        name: of the format.
        config: what will stand in ``config.json``.
        quantizer: of the format.
    """
    model.config.quantization_config = config
    model.config._is_quantized = True
    marks = {
        "hf_quantizer": quantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": name,
    }
    for key, value in marks.items():
        setattr(model, key, value)
