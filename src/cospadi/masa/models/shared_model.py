"""Common to all models with shared attention matrices: initialisation, folding, composing, and checks on loading."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from cospadi.checkpoint.headers import read_directory
from cospadi.errors import CheckpointError
from cospadi.masa.models.attention import LowRankProjection, SharedMatrices, SharedProjection
from cospadi.masa.models.coefficients import CoefficientNetwork
from cospadi.masa.models.configuration import PROJECTIONS

ALIGNMENT = 64
"""In bytes, of the memory that PyTorch's allocator returns."""

ENDINGS = tuple(f"{name}_proj.{part}" for name in PROJECTIONS for part in ("weight", "down", "up"))
"""Endings of the names of attention tensors that belong to a single layer."""


class SharedAttentionModel(PreTrainedModel):
    """Mixin for transformers models whose attention was replaced by `share_attention`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CoefficientNetwork):
            module.initialise()
        elif isinstance(module, SharedMatrices | LowRankProjection):
            module.initialise(std)
            if isinstance(module, LowRankProjection) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SharedProjection) and module.bias is not None:
            init.zeros_(module.bias)

    def fold(self) -> None:
        """Replace, in place, the networks that compute coefficients by the coefficients.

        The outputs stay the same bit for bit. A folded model holds and saves only atoms and coefficients. Fold before
        rounding to 16 bits, and create optimizers afterwards, because the parameters change.
        """
        for module in self.modules():
            if isinstance(module, SharedMatrices):
                module.fold()
        self.config.folded = True

    def compose(self) -> None:
        """Compose every layer's weight once: as fast as a dense model, and as large, plus the atoms.

        Composed weights are never saved. Training mode and loading a state release them. Call this again after changing
        atoms or coefficients by hand in evaluation mode.
        """
        for projection in _projections(self):
            projection.compose()

    def release(self) -> None:
        """Undo `compose`: compose weights at every call again, which is slower but takes less memory."""
        for projection in _projections(self):
            projection.release()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state as ``nn.Module`` does, and release composed weights, which would be stale.

        Raises:
            CheckpointError: if the state belongs to another design, even with ``strict=False``, which transformers'
                ``Trainer`` passes when it resumes: attention would silently keep its random initial values.
        """
        self.release()
        found = super().load_state_dict(*args, **kwargs)
        # a part of a model (a shard, an adapter) lacks other tensors too
        rest = set(getattr(self, "all_tied_weights_keys", None) or ())
        partial = any(not _of_attention(name) and name not in rest for name in found.missing_keys)
        faults = {name: "is missing" for name in found.missing_keys if _of_attention(name) and not partial}
        faults |= {name: "is not part of the configured model" for name in found.unexpected_keys if _of_attention(name)}
        if faults:
            name, config = min(faults), self.config
            fields = ("attention_sharing", "shared_types", "folded")
            configured = ", ".join(f"{field} {getattr(config, field)!r}" for field in fields)
            raise CheckpointError(
                f"the state to be loaded is not that of the configured attention ({configured}): tensor {name} "
                f"{faults[name]} ({len(faults)} tensors do not fit); use the configuration it was trained with"
            )
        return found

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a model as transformers does, but refuse a checkpoint that does not fit its configuration.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            *model_args: passed to transformers.
            **kwargs: passed to transformers; ``compose_weights=True`` composes every layer's weight once.

        Returns:
            The model; with ``output_loading_info=True`` the model and the loading report.

        Raises:
            CheckpointError: if tensors are missing, unexpected, or of another shape than configured; with
                ``ignore_mismatched_sizes=True`` only the shared matrices are checked.
        """
        with_report, lenient = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # checked below, by name
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model, report = loaded
        _check_report(pretrained_model_name_or_path, report, lenient)
        _align(model)
        if model.config.compose_weights:
            model.compose()
        return (model, report) if with_report else model


def _projections(model: nn.Module) -> Iterable[SharedProjection]:
    return (module for module in model.modules() if isinstance(module, SharedProjection))


def _of_attention(name: str) -> bool:
    """Whether a tensor belongs to the part of the model in which designs differ."""
    return "shared_attention." in name or name.endswith(ENDINGS)


def _align(model: nn.Module) -> None:
    """Move parameters that are not aligned in their file to aligned memory.

    Coefficients have odd sizes, so tensors that follow them in a file are not aligned. Matrix products on a CPU then
    take another code path, which rounds differently, and outputs would differ from those before saving.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _check_report(source: Any, report: dict[str, Any], lenient: bool) -> None:
    """Raise a CheckpointError unless the file and the configuration describe the same model."""
    faults = {
        name: f"is {list(file)}, but the configuration says {list(model)}"
        for name, file, model in report["mismatched_keys"]
    }
    faults |= dict.fromkeys(report["missing_keys"], "is missing")
    extra = [name for name in report["unexpected_keys"] if "shared_attention." in name]
    faults |= dict.fromkeys(extra, "is not part of the configured model")
    if lenient:
        faults = {name: fault for name, fault in faults.items() if "shared_attention." in name}
    if not faults:
        return
    name = min(faults, key=lambda key: ("shared_attention." not in key, key))
    where = str(source)
    if source is not None and Path(source).is_dir():
        entries = read_directory(Path(source))
        where = str(entries[name].file if name in entries else Path(source))
    more = f" ({len(faults)} tensors do not fit)" if len(faults) > 1 else ""
    raise CheckpointError(
        f"{where}: tensor {name} {faults[name]}{more}; weights and config.json do not belong together"
    )
