"""Save a compressed model as a directory that ``from_pretrained`` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from cospadi.checkpoint.checksums import write_checksums
from cospadi.checkpoint.convert import factored_layers, storage_dtype
from cospadi.checkpoint.formats.factored import validate
from cospadi.checkpoint.formats.factored_hf import attach
from cospadi.checkpoint.publish import staged
from cospadi.format import GroupSpec
from cospadi.layers import FactoredLinear, module_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | Path,
    groups: Sequence[GroupSpec],
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a compressed model, its tokenizer and its generation settings.

    The factors are stored in 16 bits whatever dtype the model computes in. The same model gives the same bytes.

    Args:
        model: its modules of the groups are factored layers. It is marked as compressed, otherwise unchanged.
        tokenizer: saved beside it if given.
        out_dir: directory; a checkpoint that lies there is replaced, other files stay.
        groups: all groups of the model.
        max_shard_size: of one weight file, as transformers takes it.

    Raises:
        OutputError: if the disk is full or the directory cannot be written; `out_dir` then keeps what it had.
        CheckpointError: if what was written does not read back as described.
    """
    attach(model, groups)
    with staged(Path(out_dir)) as staging, _sixteen_bits(model):
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_checksums(staging)
        validate(staging, deep=False)


@contextmanager
def _sixteen_bits(model: PreTrainedModel) -> Iterator[None]:
    """Hold the factors in the 16-bit float of the model for a while."""
    dtype = storage_dtype(model)
    kept: list[tuple[FactoredLinear, str, nn.Parameter]] = []
    for layer in factored_layers(model):
        for name, (_, kind) in module_tensors(layer.group, layer.index, dtype).items():
            parameter = layer._parameters[name]
            if parameter is None or not kind.is_floating_point or parameter.dtype == dtype:
                continue
            if parameter.device.type != "meta":  # offloaded tensors come from their file, in the dtype they have there
                kept.append((layer, name, parameter))
    try:
        for layer, name, parameter in kept:
            layer._parameters[name] = nn.Parameter(parameter.detach().to(dtype), False)
        yield
    finally:
        for layer, name, parameter in kept:
            layer._parameters[name] = parameter
