"""Save a compressed model as a directory that ``from_pretrained`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.checkpoint.checksums import write_checksums
from cospadi.checkpoint.formats.base import format_for
from cospadi.checkpoint.headers import Entry
from cospadi.checkpoint.hooks import attach
from cospadi.checkpoint.publish import staged
from cospadi.checkpoint.validate import validate
from cospadi.checkpoint.write import write_model
from cospadi.io import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | Path,
    specs: Sequence[Any],
    max_shard_size: str | int = "5GB",
    extra: Mapping[str, Entry] | None = None,
) -> list[str]:
    """Write a compressed model, its tokenizer, its generation settings and what else belongs to it.

    The type of the specs decides the format. Factors are stored in 16 bits whatever dtype the model computes in. The
    same model gives the same bytes.

    Args:
        model: its modules are already those of the format. It is marked as compressed, otherwise unchanged.
        tokenizer: saved beside the model if given.
        out_dir: directory; a checkpoint in it is replaced, other files stay.
        specs: all specs of the model, of one type.
        max_shard_size: of one weight file, as transformers takes it.
        extra: tensors to copy beside the model's; see :func:`~cospadi.checkpoint.write.write_model`.

    Returns:
        names of the files copied from where the model came from (``model.name_or_path``), such as its licence.

    Raises:
        OutputError: if the disk is full or the directory cannot be written; `out_dir` then keeps what it had.
        CheckpointError: if what was written does not read back as described, or cannot be opened.
    """
    attach(model, specs)
    with staged(expanded(out_dir)) as staging, format_for(specs).stored_dtypes(model):
        copied = write_model(model, tokenizer, staging, max_shard_size, extra)
        write_checksums(staging)
        validate(staging, deep=False)
    return copied
