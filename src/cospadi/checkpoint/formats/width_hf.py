"""How transformers reads width-pruned checkpoints: a quantization method named ``cospadi_width``, from stable hooks.

Like `hf_quantizer`, nothing here needs the model classes of transformers at import time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.formats.base import NativeQuantizer, headers_of, mark, register_format
from cospadi.checkpoint.formats.width import (
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


class WidthQuantizer(NativeQuantizer):
    """Gives a model its own shapes before the weights are read."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        spec = parse_width(self.quantization_config.to_dict())
        entries, directory = headers_of(kwargs)
        if directory is not None:
            check_width_headers(entries, spec, directory)
        here = _named_as_in(model, spec)
        narrow(model, here)
        if here != spec:  # saved again, the tensors will have the names that the modules have here
            self.quantization_config = WidthConfig(**here.to_dict())
        return model


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
    register_format(WIDTH_METHOD, WidthConfig, WidthQuantizer)


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
    mark(model, WIDTH_METHOD, config, WidthQuantizer)
    return model
