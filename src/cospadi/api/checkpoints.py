"""`inspect`, `export`, `generate` and `doctor`: what lies in a directory, and whether it works."""

from __future__ import annotations

import os

from cospadi import checkpoint, evaluation
from cospadi.api.directories import check_new_directory
from cospadi.api.runs import Bos, Model, Tokenizer
from cospadi.engine.doctor import examine
from cospadi.io import expanded
from cospadi.report.results import Contents, Continuation, Diagnosis, Export


def inspect(directory: str | os.PathLike[str]) -> Contents:
    """What is in a checkpoint: compressed, pruned or dense. Every file is verified.

    Args:
        directory: a local checkpoint.

    Returns:
        a dictionary that shows itself briefly: ``kind`` ("compressed", "pruned" or "dense"), ``model``,
        ``architecture``, ``parameters``, ``file_bytes``, ``checksums``: whether ``SHA256SUMS`` was there to compare
        with. ``groups``: a row for each stored group, with its error if ``report.json`` is there; ``tensors``: where
        nothing is stored in a format of ours, a row for each kind of tensor. ``bytes_before``, ``bytes_after`` and
        ``keep_actual`` of all groups, or of the whole pruned part as the report says it (None without a report). Of
        pruned checkpoints also ``blocks_before``, ``blocks_after`` and ``prune``, as in the report.

    Raises:
        CheckpointError: if it is damaged.
        ModelError: if it is not a model.
    """
    return Contents(evaluation.inspect(expanded(directory)))


def export(directory: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str = "auto") -> Export:
    """Write a stock checkpoint that loads without cospadi.

    Stored factors are multiplied out, which makes it as large as the original. What is stock already (dense, or with
    blocks removed) is verified and copied, unless another `dtype` is asked for.

    Args:
        directory: a compressed, pruned or dense checkpoint.
        out: new or empty directory.
        dtype: of the weights written: ``auto`` (that of the checkpoint), ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        ``{"out", "file_bytes"}``.

    Raises:
        CheckpointError: if the checkpoint is damaged, no checkpoint, of another package's format, or of a format that
            no stock model can express.
        NumericalError: if a weight is NaN or Inf, or becomes so in `dtype`.
        OutputError: if `out` is not empty or cannot be written.
    """
    target = expanded(out)
    check_new_directory(target)
    checkpoint.export_dense(expanded(directory), target, dtype=dtype)
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
