"""Any checkpoint as a stock one: factors are multiplied out, what is stock already is verified and copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cospadi.checkpoint.checksums import write_checksums
from cospadi.checkpoint.companions import copy_companions
from cospadi.checkpoint.fitting import extra_tensors
from cospadi.checkpoint.formats.base import format_of
from cospadi.checkpoint.headers import INDEX, read_json
from cospadi.checkpoint.load import load
from cospadi.checkpoint.publish import staged
from cospadi.checkpoint.validate import check_stock, read_format
from cospadi.checkpoint.write import write_model
from cospadi.errors import CheckpointError, NumericalError, OutputError
from cospadi.io import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BESIDE_THE_WEIGHTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def export_dense(
    path: str | Path,
    out: str | Path,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a checkpoint that loads without this package.

    Stored factors are multiplied out, in float32, and rounded to `dtype`; that needs the memory of the dense model. A
    checkpoint that is stock already (dense, or with blocks removed) is verified and copied byte for byte, unless
    another `dtype` is asked for.

    Args:
        path: a compressed, pruned or dense checkpoint.
        out: directory to write, other than `path`.
        dtype: of the weights written; ``"auto"`` for that of the checkpoint.
        max_shard_size: of one weight file, where weights are computed.

    Raises:
        CheckpointError: if `path` is damaged, no checkpoint, of another package's format, or of a format that no stock
            model can express.
        NumericalError: if a weight is NaN or Inf, or becomes so in `dtype`.
        OutputError: if `out` cannot be written.
    """
    from cospadi.model_view.sources import refuse_adapter  # registration must not need the model classes

    source, target = expanded(path), expanded(out)
    if target.exists() and target.resolve() == source.resolve():
        raise OutputError(f"{out}: the export would overwrite the checkpoint it reads; choose another directory")
    if not source.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    refuse_adapter(source)
    description = read_json(source / "config.json").get("quantization_config")
    if format_of(description) is not None:
        stored, _ = read_format(source)
        if stored.not_stock:
            raise CheckpointError(f"{path}: {stored.not_stock}")
    elif description is not None or dtype == "auto":
        _copy(source, target)
        return
    extra = extra_tensors(source)
    model = load(source, dtype=dtype, compose=True)
    _check_finite(model, path)
    tokenizer = _tokenizer(source)
    with staged(target) as staging:
        write_model(model, tokenizer, staging, max_shard_size, extra)
        write_checksums(staging)


def _check_finite(model: PreTrainedModel, path: str | Path) -> None:
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise NumericalError(
                f"{path}: {name} is NaN or Inf in {str(model.dtype).removeprefix('torch.')}: try another "
                "--dtype; if that fails too, the checkpoint is damaged. Nothing was written"
            )


def _copy(source: Path, target: Path) -> None:
    """Copy a stock checkpoint: what loads it, what belongs to the model, and no code."""
    entries = check_stock(source)
    _tokenizer(source)
    weights = {entry.file.name for entry in entries.values()}
    if len(weights) > 1 or (source / INDEX).exists():
        weights.add(INDEX)
    with staged(target) as staging:
        for name in (*sorted(weights), *_BESIDE_THE_WEIGHTS):
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        copy_companions(source, staging)
        write_checksums(staging)


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    if not (source / "tokenizer_config.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {error}") from error
