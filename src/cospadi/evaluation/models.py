"""Load, inspect and run any checkpoint that transformers can load."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from cospadi import checkpoint
from cospadi.calibration.begin import prompt_ids
from cospadi.checkpoint.checksums import check_checksums, has_checksums
from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError, NumericalError
from cospadi.io import expanded
from cospadi.model_view import (
    check_ids,
    kind_of,
    model_name,
    model_source,
    open_config,
    open_model,
    open_tokenizer,
    require_predictions,
    where_not_finite,
)
from cospadi.runtime.devices import compute_dtype, resolve_device
from cospadi.runtime.memory import memory_errors


def load(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu", compose: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, compressed or not, with its tokenizer.

    Args:
        source: local directory or hub id.
        dtype: ``"auto"`` (the checkpoint's; float32 on processors that compute faster in it) or a torch dtype.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        compose: compute the weights of a compressed checkpoint once, which makes an ordinary dense model: fast, and as
            large as the original. Otherwise the model stays small.

    Returns:
        an ordinary transformers model in evaluation mode, and its tokenizer.

    Raises:
        ModelError: if there is no readable model.
        CheckpointError: if a compressed checkpoint is damaged.
    """
    target = resolve_device(device)
    with memory_errors("close other programs"):
        config = open_config(source)
        if checkpoint.is_compressed(config):
            model, tokenizer = checkpoint.load(source, dtype=dtype, compose=compose), open_tokenizer(source)
        else:
            model, tokenizer = open_model(source)
            if has_checksums(expanded(source)):
                check_checksums(expanded(source))
        module: torch.nn.Module = model
        wanted = dtype if isinstance(dtype, torch.dtype) else compute_dtype(weight_bytes(model), target)
        if wanted is not None and model.dtype != wanted:
            torch.nn.Module.to(module, wanted)  # transformers' own `to` refuses models marked as quantised
        module.to(target).eval()
        return model, tokenizer


@contextmanager
def opened(
    source: object, tokenizer: object, device: str
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase, str]]:
    """A model to run, its tokenizer and its name.

    Args:
        source: local directory, hub id, or a transformers model, which afterwards is as and where it was.
        tokenizer: of a model in memory.
        device: where to run; with ``auto``, a model in memory runs where it is.

    Raises:
        ModelError: if there is no readable model.
        CheckpointError: if a compressed checkpoint is damaged.
    """
    found = model_source(source, tokenizer)
    if isinstance(found, str):
        yield *load(found, device=device), model_name(found)
        return
    with found.lent(None if device == "auto" else resolve_device(device)) as model:
        yield model, found.tokenizer, found.name


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters in memory; tied parameters count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def stored_bytes(source: object, model: PreTrainedModel) -> int:
    """Bytes of a checkpoint's weight files; of a hub id or a model in memory, those of the parameters in memory."""
    folder = expanded(source) if isinstance(source, (str, os.PathLike)) else None
    return checkpoint.file_bytes(folder) if folder is not None and folder.is_dir() else weight_bytes(model)


def inspect(directory: str | Path) -> dict[str, Any]:
    """What is in a checkpoint: compressed, pruned or dense. Every file is checked.

    Args:
        directory: a local checkpoint.

    Returns:
        ``kind`` ("compressed", "pruned" or "dense"), ``model``, ``architecture``, ``parameters``, ``file_bytes``,
        ``checksums``: whether ``SHA256SUMS`` was there to compare with. ``groups``: a row for each stored group, with
        its error if ``report.json`` is there; ``tensors``: where nothing is stored in a format of ours, a row for each
        kind of tensor. ``bytes_before``, ``bytes_after`` and ``keep_actual`` of all groups, or of the whole pruned part
        as the report says it (None without a report). Of pruned checkpoints also ``blocks_before``, ``blocks_after``
        and ``prune``, as in the report.

    Raises:
        CheckpointError: if it is damaged.
        ModelError: if it is not a model.
    """
    path = expanded(directory)
    config = open_config(path)
    stored = checkpoint.read_format(path)[0] if checkpoint.is_compressed(config) else None
    rows = stored.rows(checkpoint.validate(path)) if stored is not None else []
    tensors = kinds_of_tensors(checkpoint.check_stock(path)) if stored is None else []
    told, reported = _told(path / "report.json")
    sizes = {key: told.get(key) for key in ("bytes_before", "bytes_after", "keep_actual")}
    if rows and all(row["bytes_before"] is not None for row in rows):
        before, after = (sum(row[key] for row in rows) for key in ("bytes_before", "bytes"))
        sizes = {"bytes_before": before, "bytes_after": after, "keep_actual": after / before}
    for row in rows:
        row |= {key: reported.get(row["name"], {}).get(key) for key in ("layer", "error")}
    cut: dict[str, Any] = {key: told[key] for key in ("blocks_before", "blocks_after", "prune") if key in told}
    return {
        "directory": path.absolute().name,
        "kind": "pruned" if (stored.not_stock if stored else cut) else "compressed" if stored else "dense",
        "model": told.get("model") or model_name(path),
        "architecture": next(iter(config.architectures or []), None),
        "method": told.get("method"),
        "parameters": told.get("parameters") if stored else sum(row["parameters"] for row in tensors),
        **sizes,
        **cut,
        "file_bytes": checkpoint.file_bytes(path),
        "checksums": has_checksums(path),
        "groups": rows,
        "tensors": tensors,
    }


def kinds_of_tensors(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """A row for each kind of tensor: the same name in all layers, the same shape and dtype."""
    kinds = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), entry.shape, entry.dtype) for name, entry in entries.items()
    )
    return [
        {
            "name": name,
            "count": count,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": count * math.prod(shape),
            "bytes": count * math.prod(shape) * dtype.itemsize,
        }
        for (name, shape, dtype), count in kinds.items()
    ]


def _told(report: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A report, and its groups by name; both empty if there is none."""
    if not report.exists():
        return {}, {}
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
        return told, {row["name"]: row for row in told.get("groups", [])}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{report}: is not the report of a run ({error}); delete it to inspect without it"
        ) from None


def _refuse_nan(model: PreTrainedModel, _ids: Tensor, scores: Tensor) -> Tensor:
    if bool(scores.isnan().any()):
        raise NumericalError(f"the model's output is NaN{where_not_finite(model)}")
    return scores


def generate(
    model: object,
    prompt: str,
    *,
    tokenizer: object = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    bos: str = "auto",
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        model: local directory, hub id, or a transformers model.
        prompt: the text to continue; if empty, generation starts at the model's begin token.
        tokenizer: of a model in memory.
        max_new_tokens: upper limit.
        temperature: 0 for greedy decoding.
        seed: of the sampling.
        device: where to run; with ``auto``, a model in memory runs where it is.
        bos: whether the prompt begins with the BOS: ``"auto"`` (where the tokenizer adds it, as for transformers' own
            ``generate``), ``"on"`` or ``"off"``; never twice.

    Returns:
        ``{"prompt", "prompt_tokens", "text", "tokens", "seconds", "tokens_per_second"}``.

    Raises:
        ModelError: if the model has no embedding for a token of the prompt.
        NumericalError: if the logits are NaN, from which any token would follow.
    """
    require_predictions(kind_of(model), "generate", "use the model with transformers")
    with opened(model, tokenizer, device) as (runnable, reader, _):
        return _continued(runnable, reader, prompt, max_new_tokens, temperature, seed, bos)


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    bos: str,
) -> dict[str, Any]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([prompt_ids(prompt, tokenizer, bos) or [start or 0]], device=model.device)
    check_ids(model, tokenizer, ids)
    torch.manual_seed(seed)
    generator: Any = model
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    begun = time.perf_counter()
    with torch.no_grad(), memory_errors("use a smaller --max-new-tokens"):
        out = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([partial(_refuse_nan, model)]),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - begun
    fresh = out[0, ids.shape[1] :]
    return {
        "prompt": prompt,
        "prompt_tokens": int(ids.numel()),
        "text": tokenizer.decode(fresh, skip_special_tokens=True),
        "tokens": int(fresh.numel()),
        "seconds": seconds,
        "tokens_per_second": fresh.numel() / max(seconds, 1e-9),
    }
