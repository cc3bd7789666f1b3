"""What models with shared attention matrices have in common: initialisation, folding, composing, loud loading."""

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
"""Bytes; what PyTorch's allocator gives."""

ENDINGS = tuple(f"{name}_proj.{part}" for name in PROJECTIONS for part in ("weight", "down", "up"))
"""Of tensors that are one layer's own, in the designs that have such."""


class SharedAttentionModel(PreTrainedModel):
    """Mix-in for models of transformers whose attention was replaced by `share_attention`."""

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
        """Replace the networks that make coefficients by the coefficients they make, in place.

        Outputs stay the same, bit for bit; a folded model holds and saves atoms and coefficients only. Fold before
        rounding to 16 bits. Parameters change: make optimizers afterwards.
        """
        for module in self.modules():
            if isinstance(module, SharedMatrices):
                module.fold()
        self.config.folded = True

    def compose(self) -> None:
        """Compose every layer's weight once: as fast as a dense model, and as large besides the atoms.

        Composed weights are never saved; training mode and loading a state release them. After changing atoms or
        coefficients by hand in evaluation mode, call this again.
        """
        for projection in _projections(self):
            projection.compose()

    def release(self) -> None:
        """Compose weights at every call again: small, and slower."""
        for projection in _projections(self):
            projection.release()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module`` does; composed weights would be stale and are released.

        Raises:
            CheckpointError: if the state is that of another design, also where ``strict=False`` asks for leniency, as
                transformers' ``Trainer`` does when it resumes: attention would keep its random start.
        """
        self.release()
        found = super().load_state_dict(*args, **kwargs)
        # parts of a model (shards, adapters) lack other tensors too
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
                f"{faults[name]} ({len(faults)} tensors do not fit); go on with the configuration it was trained with"
            )
        return found

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As transformers does, but a checkpoint that does not fit its configuration stops it.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            *model_args: as transformers takes them.
            **kwargs: as transformers takes them; ``compose_weights=True`` composes every layer's weight once.

        Returns:
            the model, or with ``output_loading_info=True`` the model and the report.

        Raises:
            CheckpointError: if tensors are missing, superfluous or of another shape than the configuration says; with
                ``ignore_mismatched_sizes=True`` only the shared matrices are checked.
        """
        with_report, lenient = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # judged below, by name
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
    """Whether a tensor is part of what designs differ in."""
    return "shared_attention." in name or name.endswith(ENDINGS)


def _align(model: nn.Module) -> None:
    """Move parameters that a file left between the boundaries of vector registers.

    Coefficients have odd sizes, so that what follows them in a file is not aligned. Matrix products on a CPU then take
    another path, which rounds differently: outputs would not equal those before saving, bit for bit.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _check_report(source: Any, report: dict[str, Any], lenient: bool) -> None:
    """Stop unless the file and the configuration describe the same model."""
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
