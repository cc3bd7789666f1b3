"""How transformers reads layers of shared atoms: a quantization method named ``cospadi_masa``; saving and loading.

Registration may happen while transformers is half imported, so this module needs none of its model classes when it is
imported itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.checksums import check_checksums, write_checksums
from cospadi.checkpoint.formats.base import NativeQuantizer, headers_of, mark, register_format
from cospadi.checkpoint.formats.factored_hf import _named_as_in
from cospadi.checkpoint.formats.shared import (
    QUANT_METHOD,
    check_shared_headers,
    compose_layers,
    parse_shared,
    read_shared_config,
    replace_shared,
    shared_config,
    shared_layers,
    sixteen_bits,
    validate_shared,
)
from cospadi.checkpoint.load import load
from cospadi.checkpoint.publish import staged
from cospadi.errors import CheckpointError, OutputError
from cospadi.layers.shared_linear import SharedSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CospadiMasaConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint with shared atoms."""

    def __init__(self, **data: Any) -> None:
        """Take the JSON object as it is, after checking it.

        Raises:
            CheckpointError: if it does not describe a checkpoint that this version reads.
        """
        data.setdefault("quant_method", QUANT_METHOD)
        parse_shared(data)
        self.quant_method = data["quant_method"]
        self.format_version: int = data["format_version"]
        self.groups: list[dict[str, Any]] = data["groups"]
        if data.get("compose"):
            self.compose = True

    @property
    def dequantize(self) -> bool:
        """Whether the loaded model shall be an ordinary dense one; transformers asks by this name."""
        return getattr(self, "compose", False)


class CospadiMasaQuantizer(NativeQuantizer):
    """Builds layers of shared atoms before the weights are read; freezes or composes them afterwards."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        specs = parse_shared(self.quantization_config.to_dict())
        entries, directory = headers_of(kwargs)
        if directory is not None:
            check_shared_headers(entries, specs, directory)
        here = cast(Sequence[SharedSpec], _named_as_in(model, cast(Any, specs)))
        replace_shared(model, here, dtype if isinstance(dtype, torch.dtype) else None)
        if tuple(here) != specs:  # saved again, the tensors will have the names that the modules have here
            compose = cast(CospadiMasaConfig, self.quantization_config).dequantize
            self.quantization_config = CospadiMasaConfig(**shared_config(here, compose))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if cast(CospadiMasaConfig, self.quantization_config).dequantize:
            compose_layers(model)
            return model
        for _, layer in shared_layers(model):
            # transformers 5 makes every floating-point parameter trainable, however it was built
            for parameter in layer.factors().values():
                parameter.requires_grad_(False)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> PreTrainedModel:
        compose_layers(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.config._is_quantized = False
        return model


def register() -> None:
    """Make transformers know the format. May be called any number of times."""
    register_format(QUANT_METHOD, CospadiMasaConfig, CospadiMasaQuantizer)


def attach_shared(model: PreTrainedModel, specs: Sequence[SharedSpec]) -> None:
    """Mark a model whose layers were replaced as one of this format, as if it had been loaded.

    Afterwards plain ``model.save_pretrained`` writes a complete checkpoint.

    Args:
        model: its modules are already layers of shared atoms.
        specs: all groups.
    """
    register()
    config = CospadiMasaConfig(**shared_config(specs))
    mark(model, QUANT_METHOD, config, CospadiMasaQuantizer)


def save_shared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | Path,
    specs: Sequence[SharedSpec],
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a model with shared atoms, its tokenizer and its generation settings; factors are stored in 16 bits.

    Args:
        model: its modules of the groups are layers of shared atoms. It is marked as such, otherwise unchanged.
        tokenizer: saved beside it if given.
        out_dir: directory; a checkpoint that lies there is replaced, other files stay.
        specs: all groups of the model.
        max_shard_size: of one weight file, as transformers takes it.

    Raises:
        OutputError: if the disk is full or the directory cannot be written; `out_dir` then keeps what it had.
        CheckpointError: if what was written does not read back as described.
    """
    attach_shared(model, specs)
    with staged(Path(out_dir)) as staging, sixteen_bits(model):
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_checksums(staging)
        validate_shared(staging, deep=False)


def load_shared(
    path: str | Path, *, compose: bool = False, dtype: str | torch.dtype = "auto", checksums: bool = True, **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint with shared atoms, loudly: whatever is missing or damaged stops it.

    Args:
        path: directory.
        compose: compose every layer's weight once, into an ordinary dense model: fast, and as large as the original.
            Otherwise weights are composed at every call and the model stays small.
        dtype: ``"auto"`` for that of the checkpoint, or the floating-point dtype to compute in.
        checksums: compare the weight files with ``SHA256SUMS``, where that file is.
        **kwargs: passed on to ``from_pretrained``.

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: if the checkpoint is absent or damaged; names file and tensor.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    validate_shared(directory, deep=False)
    if checksums:
        check_checksums(directory)
    register()
    model = load(directory, dtype=dtype, **kwargs)
    if compose and shared_layers(model):
        dense: Any = model
        dense.dequantize(dtype=model.dtype)
    return model


def export_shared(path: str | Path, out: str | Path, dtype: str | torch.dtype = "auto") -> None:
    """Compose every layer and write a checkpoint that loads without this package.

    Args:
        path: a checkpoint with shared atoms.
        out: directory to write, another than `path`.
        dtype: of the weights written; ``"auto"`` for that of the checkpoint.

    Raises:
        CheckpointError: if `path` is damaged.
        OutputError: if `out` cannot be written.
    """
    from transformers import AutoTokenizer

    source, target = Path(path), Path(out)
    if target.exists() and target.resolve() == source.resolve():
        raise OutputError(f"{out}: the export would overwrite the checkpoint it reads; choose another directory")
    read_shared_config(source)
    model = load_shared(source, compose=True, dtype=dtype)
    with staged(target) as staging:
        model.save_pretrained(staging)
        if (source / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(staging)
