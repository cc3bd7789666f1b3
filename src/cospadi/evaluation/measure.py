"""`cospadi evaluate`: perplexity and task scores of a model, and of a second one measured in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import read_texts
from cospadi.errors import CalibrationError
from cospadi.evaluation.models import load, stored_bytes
from cospadi.evaluation.perplexity import perplexity
from cospadi.evaluation.tasks import find_tasks, require_lm_eval, run_tasks
from cospadi.model_view import model_class, model_name, open_config, require_predictions
from cospadi.progress import Progress, silent
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions
from cospadi.runtime.memory import memory_errors


def evaluate(
    source: str | Path,
    *,
    text: str | Path | list[str] | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    against: str | Path | None = None,
    seq_len: int = 1024,
    max_blocks: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity and task scores of a checkpoint and, optionally, of a second one.

    Args:
        source: any checkpoint that transformers can load.
        text: a file (``.txt``: one document; ``.jsonl`` …: documents joined by the end token) or a list of texts.
        tasks: task files, directories of them, or names, see :func:`~cospadi.evaluation.tasks.run_tasks`.
        limit: number of examples per task.
        against: a second model, usually the dense one.
        seq_len: tokens per block.
        max_blocks: evaluate at most this many blocks from the start.
        batch: blocks per batch.
        device: where the models run.
        progress: called with (phase, done, total).

    Returns:
        with a text ``perplexity, tokens, bits_per_byte, word_perplexity``; with tasks ``tasks`` and ``harness``;
        ``bytes`` (of the weight files); and, with `against`, the same keys prefixed by ``dense_``.

    Raises:
        CalibrationError: if there is no usable text or task.
        ResourceError: if tasks are given and lm-eval is not installed.
    """
    if text is None and not tasks:
        raise CalibrationError("nothing to evaluate: pass --text FILE or --tasks FILE")
    if tasks:
        find_tasks(tasks, limit)
        require_lm_eval()
    for measured in [source] if against is None else [source, against]:
        kind, _ = model_class(open_config(measured))
        require_predictions(kind, "evaluate", "measure the model on its own task")
    result: dict[str, Any] = {}
    if text is not None:
        read_texts(text)  # fail before the models are loaded
        result["text"] = Path(text).name if isinstance(text, (str, Path)) else "a list of texts"
    for prefix, which in (("", source), ("dense_", against)):
        if which is None:
            continue
        model, tokenizer = load(which, device=device)
        with memory_errors("use a smaller --batch"):
            found = _figures(model, tokenizer, text, seq_len, max_blocks, batch, progress)
            if tasks:
                report = partial(progress or silent, "tasks")
                found |= run_tasks(model, tokenizer, tasks, limit=limit, progress=report)
        found |= {"model": model_name(which), "bytes": stored_bytes(which, model)}
        shared = {key: found.pop(key) for key in ("blocks", "seq_len", "harness") if key in found}
        result |= shared | {f"{prefix}{key}": value for key, value in found.items()}
    return result | {"device": device_name(resolve_device(device)), "versions": versions()}


def _figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | list[str] | None,
    seq_len: int,
    max_blocks: int | None,
    batch: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Perplexity and related numbers; empty without a text."""
    if text is None:
        return {}
    measured = perplexity(
        model,
        tokenizer,
        text,
        seq_len=seq_len,
        max_blocks=max_blocks,
        batch=batch,
        device=str(model.device),
        progress=partial(progress or silent, "evaluate"),
    )
    return {
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "word_perplexity": measured.word_perplexity,
        "tokens": measured.tokens,
        "blocks": measured.blocks,
        "seq_len": seq_len,
    }
