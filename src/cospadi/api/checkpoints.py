"""`inspect`, `export`, `generate` and `doctor`: what lies in a directory, and whether it works."""

from __future__ import annotations

import os
from pathlib import Path

from cospadi import checkpoint, evaluation
from cospadi.api.directories import check_new_directory
from cospadi.api.runs import Bos, Model, Tokenizer
from cospadi.engine.doctor import examine
from cospadi.report.results import Contents, Continuation, Diagnosis, Export


def inspect(directory: str | os.PathLike[str]) -> Contents:
    """What is in a compressed checkpoint; every file is verified.

    Args:
        directory: a local checkpoint of any registered format.

    Returns:
        a dictionary that shows itself briefly: ``groups``: a row for each stored group, with its error if
        ``report.json`` is there; ``bytes_before``, ``bytes_after`` and ``keep_actual`` of all groups, or of the whole
        pruned part as the report says it where the format does not know the original sizes (None without a report);
        ``file_bytes``.

    Raises:
        CheckpointError: if it is damaged or not compressed by cospadi.
    """
    return Contents(evaluation.inspect(Path(directory)))


def export(directory: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str = "auto") -> Export:
    """Write a stock checkpoint that loads without cospadi and is as large as the original.

    Args:
        directory: a compressed checkpoint.
        out: new or empty directory.
        dtype: of the weights written: ``auto`` (that of the checkpoint), ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        ``{"out", "file_bytes"}``.

    Raises:
        CheckpointError: if the checkpoint is damaged, not compressed, or of a format that no stock model can express.
        NumericalError: if a weight is NaN or Inf, or becomes so in `dtype`.
        OutputError: if `out` is not empty or cannot be written.
    """
    target = Path(out)
    check_new_directory(target)
    checkpoint.export_dense(Path(directory), target, dtype=dtype)
    return Export({"out": str(target), "file_bytes": checkpoint.file_bytes(target)})


def generate(
    model: Model,
    prompt: str,
    *,
    tokenizer: Tokenizer = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    bos: Bos = "auto",
    device: str = "auto",
) -> Continuation:
    """Continue a prompt.

    Args:
        model: local directory, hub id, or a transformers model.
        prompt: the text to continue; if empty, generation starts at the model's begin token.
        tokenizer: of a model in memory: the tokenizer, or where to read it.
        max_new_tokens: upper limit.
        temperature: 0 for greedy decoding.
        seed: of the sampling.
        bos: whether the prompt begins with the BOS token: ``auto`` (where the tokenizer adds it), ``on`` or ``off``;
            never twice.
        device: where to run; with ``auto``, a model in memory runs where it is.

    Returns:
        ``{"prompt", "prompt_tokens", "text", "tokens", "seconds", "tokens_per_second"}``.

    Raises:
        ModelError: if the model has no embedding for a token of the prompt.
        NumericalError: if the logits are NaN, from which any token would follow.
    """
    return Continuation(
        evaluation.generate(
            model,
            prompt,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            bos=bos,
            device=device,
        )
    )


def doctor() -> Diagnosis:
    """Check the installation: versions, devices, optional packages, and a tiny run.

    Returns:
        ``{"healthy": bool, "checks": [{"name", "ok" (None: optional and absent), "detail"}]}``.
    """
    return Diagnosis(examine())
