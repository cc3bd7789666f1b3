"""`cospadi evaluate`: perplexity and task scores of a model, and of a second one measured in the same way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from types import NoneType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.aliases import canonical_bos
from cospadi.calibration import Texts, TextSource, read_texts, short_name
from cospadi.errors import CalibrationError
from cospadi.evaluation.models import opened, stored_bytes
from cospadi.evaluation.perplexity import perplexity
from cospadi.evaluation.tasks import find_tasks, require_lm_eval, run_tasks
from cospadi.model_view import kind_of, model_source, require_predictions
from cospadi.progress import Progress, silent
from cospadi.runtime.devices import device_name
from cospadi.runtime.fingerprints import versions
from cospadi.runtime.memory import memory_errors


def evaluate(
    model: object,
    *,
    tokenizer: object = None,
    text: TextSource | None = None,
    text_field: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    against: object = None,
    seq_len: int = 1024,
    max_blocks: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    bos: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity and task scores of a checkpoint and, optionally, of a second one.

    Args:
        model: any checkpoint that transformers can load, or a transformers model, which stays as it is.
        tokenizer: of models in memory.
        text: whatever :func:`~cospadi.calibration.read_texts` takes: a file, a directory, a hub data set, or documents
            in memory; several documents are joined by the end token.
        text_field: the field of records that holds the text or messages; None: ``text``, ``messages``, or ``prompt``
            and ``completion``.
        tasks: task files, directories of them, or names, see :func:`~cospadi.evaluation.tasks.run_tasks`.
        limit: number of examples per task.
        against: a second model, usually the dense one.
        seq_len: tokens per block.
        max_blocks: evaluate at most this many blocks from the start.
        batch: blocks per batch.
        device: where the models run; with ``auto``, a model in memory runs where it is.
        bos: whether blocks and examples begin with the BOS: ``"auto"`` (where the tokenizer adds it), ``"on"`` or
            ``"off"``.
        progress: called with (phase, done, total).

    Returns:
        ``bos``; with a text ``perplexity, tokens, bits_per_byte, word_perplexity, begins_with``; with tasks ``tasks``
        and ``harness``; ``bytes`` (of the weight files); and, with `against`, the same keys prefixed by ``dense_``.

    Raises:
        CalibrationError: if there is no usable text or task.
        ResourceError: if tasks are given and lm-eval is not installed.
    """
    if text is None and not tasks:
        raise CalibrationError("nothing to evaluate: pass --text FILE or --tasks FILE")
    if tasks:
        find_tasks(tasks, limit)
        require_lm_eval()
    for measured in [model] if against is None else [model, against]:
        require_predictions(kind_of(measured), "evaluate", "measure the model on its own task")
    result: dict[str, Any] = {"bos": canonical_bos(bos)}
    texts = None
    if text is not None:
        texts = read_texts(text, field=text_field)  # fail before the models are loaded
        result |= {"text": short_name(text), "fields": list(texts.fields)}
    in_memory = [not isinstance(which, (str, os.PathLike, NoneType)) for which in (model, against)]
    if not any(in_memory):
        model_source(model, tokenizer)  # a tokenizer would go with neither
    for prefix, which, lies_there in zip(("", "dense_"), (model, against), in_memory, strict=True):
        if which is None:
            continue
        with (
            opened(which, tokenizer if lies_there else None, device) as (runnable, reader, name),
            memory_errors("use a smaller --batch"),
        ):
            found = _figures(runnable, reader, texts, seq_len, max_blocks, batch, bos, progress)
            if tasks:
                report = partial(progress or silent, "tasks")
                found |= run_tasks(runnable, reader, tasks, limit=limit, bos=bos, progress=report)
            found |= {"model": name, "bytes": stored_bytes(which, runnable)}
            used = device_name(runnable.device)
        shared = {key: found.pop(key) for key in ("blocks", "seq_len", "harness") if key in found}
        result |= shared | {f"{prefix}{key}": value for key, value in found.items()}
    return result | {"device": used, "versions": versions()}


def _figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts | None,
    seq_len: int,
    max_blocks: int | None,
    batch: int | None,
    bos: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Perplexity and related numbers; empty without a text."""
    if texts is None:
        return {}
    measured = perplexity(
        model,
        tokenizer,
        texts,
        seq_len=seq_len,
        max_blocks=max_blocks,
        batch=batch,
        bos=bos,
        device=str(model.device),
        progress=partial(progress or silent, "evaluate"),
    )
    return {
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "word_perplexity": measured.word_perplexity,
        "tokens": measured.tokens,
        "blocks": measured.blocks,
        "begins_with": measured.begins_with,
        "seq_len": seq_len,
    }
