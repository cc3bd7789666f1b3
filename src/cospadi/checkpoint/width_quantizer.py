"""How transformers reads width-pruned checkpoints: a quantization method named ``cospadi_width``, from stable hooks.

Like `hf_quantizer`, nothing here needs the model classes of transformers at import time.
"""

from __future__ import annotations

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
from cospadi.checkpoint.width import (
    WIDTH_METHOD,
    WidthSpec,
    check_width_headers,
    describe_width,
    narrow,
    parse_width,
)
from cospadi.layers.sliced import SlicedNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WidthConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a width-pruned checkpoint."""

    def __init__(self, **data: Any) -> None:
        """Take the JSON object as it is, after checking it.

        Raises:
            CheckpointError: if it does not describe a checkpoint that this version reads.
        """
        data.setdefault("quant_method", WIDTH_METHOD)
        parse_width(data)
        self.quant_method = data["quant_method"]
        self.format_version: int = data["format_version"]
        self.linears: dict[str, Any] = data["linears"]
        self.embeddings: dict[str, int] = data["embeddings"]
        self.blocks: dict[str, Any] = data["blocks"]


class WidthQuantizer(HfQuantizer):
    """Gives a model its own shapes before the weights are read."""

    requires_calibration = True  # a whole model is pruned by `cospadi prune`, not on the fly while loading

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        spec = parse_width(self.quantization_config.to_dict())
        # Not every version of transformers says which files it will read; where it does, damage is named early.
        files = [Path(file) for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
        entries: dict[str, Entry] = {}
        for file in files:
            entries |= read_header(file)
        if files:
            check_width_headers(entries, spec, files[0].parent)
        here = _named_as_in(model, spec)
        narrow(model, here)
        if here != spec:  # saved again, the tensors will have the names that the modules have here
            self.quantization_config = WidthConfig(**here.to_dict())
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` may be called: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on top."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves may be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` may be used."""
        return True


def _named_as_in(model: PreTrainedModel, spec: WidthSpec) -> WidthSpec:
    """The description under the module names of this model.

    A language model may be loaded as its bare decoder (``AutoModel``), and the other way round; names then lack, or
    gain, the decoder's prefix.
    """
    known = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    for rename in (lambda name: name, lambda name: name.removeprefix(prefix), lambda name: prefix + name):
        renamed = spec.renamed(rename)
        if known.issuperset(renamed.modules):
            return renamed
    return spec  # whoever uses it names the module that is missing


def register_width() -> None:
    """Make transformers know the format. May be called any number of times."""
    if WIDTH_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(WIDTH_METHOD)(WidthConfig)
    if WIDTH_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(WIDTH_METHOD)(WidthQuantizer)


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
    spec = describe_width(model)
    if not spec:
        return model
    register_width()
    if spec.blocks:
        name, block = next(iter(spec.blocks.items()))
        norm = model.get_submodule(f"{name}.{block.parts.mixer_norm}")
        assert isinstance(norm, SlicedNorm)
        norm.add_guard(next(model.get_submodule(name).parameters()).device)
    config = WidthConfig(**spec.to_dict())
    model.config.quantization_config = config
    model.config._is_quantized = True
    marks: dict[str, Any] = {
        "hf_quantizer": WidthQuantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": WIDTH_METHOD,
    }
    for name, value in marks.items():
        setattr(model, name, value)
    return model
