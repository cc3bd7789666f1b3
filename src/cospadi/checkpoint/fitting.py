"""How stored tensors fit the class that opens them: found by transformers' own loading, from headers alone.

A model is opened on ``meta`` from stand-ins for its tensors that have shapes and no data. That costs no memory and
moments for any size, and everything happens that happens when the model is opened for real: tensors are renamed, split
and joined, modules of a format are put in place, and what is missing is initialised. A stand-in that was never asked
for belongs to a tensor that the class does not take; transformers hides many of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cospadi.checkpoint.headers import INDEX, SINGLE, Entry, read_directory, read_header, read_json
from cospadi.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OPENED_WHOLE = 100_000_000
"""Up to this many bytes a result is opened with its data, beyond that from its headers."""


@dataclass(frozen=True)
class Fit:
    """How stored tensors fit a model.

    Attributes:
        model: as it was opened, on ``meta``.
        missing: the model's tensors that are not stored, by its own names.
        misshapen: those that are stored in another shape.
        extra: stored tensors that the class does not take, by their stored names; without what an earlier version of
            the class stored and now computes.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def fault(self) -> str:
        """Why the model would not open as it was saved; empty if it would."""
        for kind, names in (("missing", self.missing), ("of another shape", self.misshapen)):
            if names:
                return f"{names[0]} is {kind}" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
        return ""


class _StandIn:
    """What transformers takes for a slice of a safetensors file."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, asked: set[str]) -> None:
        self.name, self.shape, self.dtype, self._asked = name, shape, dtype, asked

    def __getitem__(self, _: Any) -> Tensor:
        self._asked.add(self.name)
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return str(self.dtype)


def fit(config: PreTrainedConfig, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Fit:
    """Open a model on ``meta`` from the shapes and dtypes of its stored tensors.

    Args:
        config: as it was read from ``config.json``.
        stored: shape and dtype by stored name.

    Raises:
        ModelError: if transformers has no class for the configuration.
        Exception: whatever transformers raises when the model cannot be opened.
    """
    from cospadi.model_view import model_class  # like all of transformers' model classes, not at import time

    asked: set[str] = set()
    kind, own = model_class(config)
    floats = (dtype for _, dtype in stored.values() if dtype.is_floating_point and dtype.itemsize > 1)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else next(floats, torch.float32)
    with quietly():
        loaded: Any = kind.from_pretrained(
            None,
            config=own,
            state_dict={name: _StandIn(name, *known, asked) for name, known in stored.items()},
            device_map={"": "meta"},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    told = set(info.get("unexpected_keys", ()))
    spare = sorted(stored.keys() - asked)
    return Fit(
        model,
        tuple(sorted(info.get("missing_keys", ()))),
        tuple(sorted(name for name, *_ in info.get("mismatched_keys", ()))),
        tuple(name for name in spare if not _leftover(name, model, hidden=name not in told)),
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars and remarks of transformers: nobody asked for this model."""
    from transformers.utils import logging

    chatter: Any = logging
    bars, level = chatter.is_progress_bar_enabled(), chatter.get_verbosity()
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _leftover(name: str, model: PreTrainedModel, *, hidden: bool) -> bool:
    """Whether an earlier version of the class stored a tensor that is computed now, such as a causal mask."""
    ends = {tuple(buffer.split(".")[-2:]) for buffer, _ in model.named_buffers()}
    if tuple(name.split(".")[-2:]) in ends:
        return True
    owner = name.rpartition(".")[0]
    modules = {module for module, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    return hidden and bool(modules & {owner, prefix + owner, owner.removeprefix(prefix)} - {""})


def extra_tensors(source: str | Path) -> dict[str, Entry]:
    """The tensors of a checkpoint that the model's class does not take, by their stored names.

    Args:
        source: local directory or hub id. Of a hub id, only what is in the cache already is looked at.

    Returns:
        empty too if no weights are here yet.

    Raises:
        CheckpointError: if a weight file is damaged.
    """
    from cospadi.model_view import open_config, weights_directory

    directory = weights_directory(source)
    entries = {} if directory is None else _entries(directory)
    if not entries:
        return {}
    found = fit(open_config(source), {name: (entry.shape, entry.dtype) for name, entry in entries.items()})
    return {name: entries[name] for name in found.extra}


def _entries(directory: Path) -> dict[str, Entry]:
    """All tensors of the weight files that transformers would read, whatever their index says of each."""
    files = [SINGLE] if (directory / SINGLE).exists() else []
    if not files and (directory / INDEX).exists():
        files = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    return {name: entry for file in files for name, entry in read_header(directory / file).items()}


def check_opens(directory: Path, extra: Mapping[str, Any]) -> None:
    """Open a checkpoint once as whoever uses it will, before it is called finished.

    Args:
        directory: of the checkpoint.
        extra: names of stored tensors that do not belong to the class.

    Raises:
        CheckpointError: if it cannot be opened, or a tensor has no place.
    """
    from cospadi.model_view import model_class, open_config

    entries = read_directory(directory)
    config = open_config(directory)
    try:
        found = fit(config, {name: (entry.shape, entry.dtype) for name, entry in entries.items()})
        fault = found.fault
        if not fault and (lost := set(found.extra) - set(extra)):
            fault = f"{min(lost)} belongs to no module"
        if not fault and sum(entry.bytes for entry in entries.values()) <= OPENED_WHOLE:
            kind, own = model_class(config)
            with quietly():
                kind.from_pretrained(directory, config=own, dtype="auto", use_safetensors=True, local_files_only=True)
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:240]
    if fault:
        name = (config.architectures or [type(config).__name__])[0]
        raise CheckpointError(
            f"the result cannot be opened as {name} ({fault}); this architecture is not supported with these settings"
        )
