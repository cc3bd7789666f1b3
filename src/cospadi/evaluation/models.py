"""Load, inspect and run any checkpoint that transformers can load."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from cospadi import checkpoint
from cospadi.checkpoint.checksums import check_checksums, has_checksums
from cospadi.checkpoint.headers import Entry
from cospadi.errors import CheckpointError, NumericalError
from cospadi.io import expanded
from cospadi.model_view import (
    model_class,
    model_name,
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


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters in memory; tied parameters count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def stored_bytes(source: str | Path, model: PreTrainedModel) -> int:
    """Bytes of a checkpoint's weight files; of a hub id, those of the parameters in memory."""
    return checkpoint.file_bytes(source) if expanded(source).is_dir() else weight_bytes(model)


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
    source: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        source: local directory or hub id.
        prompt: the text to continue; if empty, generation starts at the model's begin token.
        max_new_tokens: upper limit.
        temperature: 0 for greedy decoding.
        seed: of the sampling.
        device: where to run.

    Returns:
        ``{"prompt", "text", "tokens", "seconds", "tokens_per_second"}``.

    Raises:
        NumericalError: if the logits are NaN, from which any token would follow.
    """
    require_predictions(model_class(open_config(source))[0], "generate", "use the model with transformers")
    model, tokenizer = load(source, device=device)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.long()
    if ids.shape[1] == 0:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[start or 0]])
    ids = ids.to(model.device)
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
        "text": tokenizer.decode(fresh, skip_special_tokens=True),
        "tokens": int(fresh.numel()),
        "seconds": seconds,
        "tokens_per_second": fresh.numel() / max(seconds, 1e-9),
    }
