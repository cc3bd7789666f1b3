"""`cospadi evaluate`: a model's figures, beside those of another measured in the same way."""

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
    """Perplexity and task scores of a checkpoint and, if asked, of another.

    Args:
        source: any checkpoint that transformers can load.
        text: file (``.txt``: one document; ``.jsonl`` …: documents joined by the end token) or list of texts.
        tasks: task files, directories of such or names, see :func:`~cospadi.evaluation.tasks.run_tasks`.
        limit: examples of every task.
        against: a second model, usually the dense one.
        seq_len: tokens per block.
        max_blocks: only the first so many blocks.
        batch: blocks at once.
        device: where.
        progress: called with (phase, done, total).

    Returns:
        with a text ``perplexity, tokens, bits_per_byte, word_perplexity``; with tasks ``tasks`` and ``harness``;
        ``bytes`` (of the weight files); and, with `against`, the same with ``dense_`` before.

    Raises:
        CalibrationError: if there is no usable text or task.
        ResourceError: if there are tasks and lm-eval is not installed.
    """
    if text is None and not tasks:
        raise CalibrationError("nothing to measure on: name a text with --text FILE, or tasks with --tasks FILE")
    if tasks:
        find_tasks(tasks, limit)
        require_lm_eval()
    result: dict[str, Any] = {}
    if text is not None:
        read_texts(text)  # before the models, which take longer
        result["text"] = Path(text).name if isinstance(text, (str, Path)) else "a list of texts"
    for prefix, which in (("", source), ("dense_", against)):
        if which is None:
            continue
        model, tokenizer = load(which, device=device)
        with memory_errors():
            found = _figures(model, tokenizer, text, seq_len, max_blocks, batch, progress)
            if tasks:
                report = partial(progress or silent, "tasks")
                found |= run_tasks(model, tokenizer, tasks, limit=limit, progress=report)
        found |= {"model": Path(which).name, "bytes": stored_bytes(which, model)}
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
    """Perplexity and its kin; nothing without a text."""
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
