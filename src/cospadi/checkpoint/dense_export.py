"""A compressed checkpoint as a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.load import load
from cospadi.checkpoint.publish import staged
from cospadi.checkpoint.validate import read_format
from cospadi.checkpoint.write import write_model
from cospadi.errors import CheckpointError, NumericalError, OutputError


def export_dense(
    path: str | Path,
    out: str | Path,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
) -> None:
    """Compute every stored weight and write a checkpoint that loads without this package.

    Needs the memory of the dense model. Weights are computed in float32, then rounded to `dtype`.

    Args:
        path: a compressed checkpoint.
        out: directory to write, other than `path`.
        dtype: of the weights written; ``"auto"`` for that of the checkpoint.
        max_shard_size: of one weight file.

    Raises:
        CheckpointError: if `path` is damaged, not compressed, or of a format that no stock model can express.
        NumericalError: if a weight is NaN or Inf, or becomes so in `dtype`.
        OutputError: if `out` cannot be written.
    """
    source, target = Path(path), Path(out)
    if target.exists() and target.resolve() == source.resolve():
        raise OutputError(f"{out}: the export would overwrite the checkpoint it reads; choose another directory")
    if not source.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    stored, _ = read_format(source)
    if stored.not_stock:
        raise CheckpointError(f"{path}: {stored.not_stock}")
    model = load(source, dtype=dtype, compose=True)
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise NumericalError(
                f"{path}: {name} is NaN or Inf in {str(model.dtype).removeprefix('torch.')}: try another "
                "--dtype; if that fails too, the checkpoint is damaged. Nothing was written"
            )
    with staged(target) as staging:
        write_model(model, _tokenizer(source), staging, max_shard_size)


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    if not (source / "tokenizer_config.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {error}") from error
