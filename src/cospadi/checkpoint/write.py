"""Write everything that a checkpoint consists of."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.checkpoint.companions import copy_companions
from cospadi.checkpoint.extra_file import add_extra
from cospadi.checkpoint.fitting import check_opens
from cospadi.checkpoint.headers import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SETTINGS = "generation_config.json"


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    max_shard_size: str | int = "5GB",
    extra: Mapping[str, Entry] | None = None,
) -> list[str]:
    """Write weights, configuration, generation settings and tokenizer, and copy what else belongs to the model.

    What was written is then opened once, as whoever uses it will.

    Args:
        model: what is written; ``model.name_or_path`` says where it came from.
        tokenizer: written beside the model if given.
        folder: where to write.
        max_shard_size: of one weight file, as transformers takes it.
        extra: tensors of the checkpoint that the model was read from which its class does not take; they are copied
            byte for byte.

    Returns:
        names of the copied files; see :func:`~cospadi.checkpoint.companions.copy_companions`.

    Raises:
        CheckpointError: if the result cannot be opened.
    """
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is not None:  # saved below: transformers reads and uses some settings that it refuses to save
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if settings is not None:
            model.generation_config = settings
    (folder / _SETTINGS).unlink(missing_ok=True)
    if extra:
        add_extra(folder, extra, model.num_parameters())
    copied = write_side_files(model, tokenizer, folder)
    check_opens(folder, extra or {})
    return copied


def write_side_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> list[str]:
    """Write or copy all files of a checkpoint but weights and configuration; see :func:`write_model`."""
    settings: Any = model.generation_config if model.can_generate() else None
    # hash and attribute: how transformers itself finds out whether settings are still those of the file
    if settings is not None and getattr(settings, "_original_object_hash", None) != hash(settings):
        _write_settings(settings, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copied = copy_companions(str(model.name_or_path or ""), folder)
    if settings is not None and not (folder / _SETTINGS).exists():
        _write_settings(settings, folder)
    return copied


def _write_settings(settings: Any, folder: Path) -> None:
    """Generation settings unjudged: many published models have some without effect, which transformers won't save."""
    plain = copy(settings)
    plain.compile_config = None  # an object, and not of the model but of the run
    plain.to_json_file(folder / _SETTINGS, use_diff=True)
