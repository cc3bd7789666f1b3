"""Loading, inspecting and running any checkpoint that transformers can load."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi import checkpoint
from cospadi.engine.machine import compute_dtype, memory_errors, resolve_device
from cospadi.errors import CheckpointError
from cospadi.model_view import is_compressed, open_config, open_model, open_tokenizer


def load(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, compressed or not, with its tokenizer.

    Args:
        source: local directory or hub id.
        dtype: ``"auto"`` (the checkpoint's; float32 on processors that compute faster in it) or a torch dtype.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        an ordinary transformers model in evaluation mode, and its tokenizer.

    Raises:
        ModelError: if there is no readable model.
        CheckpointError: if a compressed checkpoint is damaged.
    """
    target = resolve_device(device)
    with memory_errors():
        if is_compressed(open_config(source)):
            model, tokenizer = checkpoint.load(source, dtype=dtype), open_tokenizer(source)
        else:
            model, tokenizer = open_model(source)
        module: torch.nn.Module = model
        wanted = dtype if isinstance(dtype, torch.dtype) else compute_dtype(weight_bytes(model), target)
        if wanted is not None and model.dtype != wanted:
            torch.nn.Module.to(module, wanted)  # transformers' own `to` refuses models marked as quantised
        module.to(target).eval()
        return model, tokenizer


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters in memory; tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def stored_bytes(source: str | Path, model: PreTrainedModel) -> int:
    """Bytes of a checkpoint's weight files; of a hub id, those of the parameters in memory."""
    return checkpoint.file_bytes(source) if Path(source).is_dir() else weight_bytes(model)


def inspect(directory: str | Path) -> dict[str, Any]:
    """What is in a compressed checkpoint; every file is checked.

    Args:
        directory: a local compressed checkpoint.

    Returns:
        groups with their specs, bytes and (from ``report.json``, if it is there) errors.

    Raises:
        CheckpointError: if it is damaged or not compressed by cospadi.
    """
    path = Path(directory)
    if not is_compressed(open_config(path)):
        raise CheckpointError(f"{path} is not compressed by cospadi: its config.json has no such quantization_config")
    groups = checkpoint.validate(path, deep=True)
    report = path / "report.json"
    told = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    rows = {row["name"]: row for row in told.get("groups", [])}
    return {
        "directory": path.name,
        "model": told.get("model"),
        "method": told.get("method"),
        "bytes_before": sum(g.dense_bytes for g in groups),
        "bytes_after": sum(g.bytes for g in groups),
        "keep_actual": sum(g.bytes for g in groups) / sum(g.dense_bytes for g in groups),
        "file_bytes": checkpoint.file_bytes(path),
        "groups": [
            {
                "name": g.name,
                "layer": rows.get(g.name, {}).get("layer"),
                "modules": list(g.modules),
                "method": g.method,
                "atoms": g.atoms if g.dictionary else None,
                "nonzeros": g.codes.nonzeros if g.codes.sparse else None,
                "pattern": g.codes.pattern,
                "bits": {"dictionary": g.dictionary.bits if g.dictionary else None, "values": g.codes.bits},
                "bytes": g.bytes,
                "bytes_before": g.dense_bytes,
                "error": rows.get(g.name, {}).get("error"),
            }
            for g in groups
        ],
    }


def generate(
    source: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Go on from a prompt.

    Args:
        source: local directory or hub id.
        prompt: the beginning; may be empty (then the model begins at its begin token).
        max_new_tokens: at most so many.
        temperature: 0 for greedy decoding.
        seed: of the sampling.
        device: where.

    Returns:
        ``{"prompt", "text", "tokens", "seconds", "tokens_per_second"}``.
    """
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
    with torch.no_grad():
        out = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
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
