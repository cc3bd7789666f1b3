"""PEFT: merging LoRA adapters into compressed layers, exactly where that is possible and not at all elsewhere.

Adapters train on compressed layers without this module: PEFT takes them for ``nn.Linear``, and an attempt to change
their weight raises. PEFT discovers that layer by layer, though, when it has merged others already. This module teaches
PEFT to ask first, so that a refused merge changes nothing, and to store LoRA adapters as more atoms and codes
(`cospadi.layers.low_rank_update`) where that is exact.

It is imported when PEFT has been, see ``_cospadi_autoload.py`` and its off switches; without it every merge is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from cospadi.checkpoint.formats.base import format_of
from cospadi.checkpoint.hooks import attach
from cospadi.errors import ModelError, NumericalError
from cospadi.layers import ComputedLinear
from cospadi.layers.low_rank_update import LowRank, add_low_rank, why_inexact


class StoredLora(LoraLinear):
    """LoRA on a compressed layer.

    A merged adapter is still computed beside the layer, so that it can be taken off again without a trace. It becomes
    part of the stored tensors when PEFT removes the adapter layers, as in ``merge_and_unload``.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark adapters as merged.

        Args:
            safe_merge: refuse adapters that are not finite.
            adapter_names: which; None for the active ones.

        Raises:
            ModelError: if the layer cannot store them exactly.
            NumericalError: if `safe_merge` finds NaN or Inf.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            reason = self.why_not_merged(name)
            if reason:
                raise _refusal(self.get_base_layer(), reason)
            if safe_merge and not all(part.isfinite().all() for part in self.low_rank(name)):
                raise NumericalError(f"{_name(self.get_base_layer())}: adapter {name} has NaN or Inf")
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Mark all adapters as not merged."""
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The compressed layer, with merged adapters waiting to be stored.

        Args:
            merge: merge first.
            safe_merge: see :meth:`merge`.
            adapter_names: see :meth:`merge`.
        """
        if merge:
            self.merge(safe_merge, adapter_names)
        layer: Any = self.get_base_layer()
        parts = [self.low_rank(name) for name in self.merged_adapters]
        if parts:
            layer.waiting_update = LowRank(torch.cat([p.down for p in parts]), torch.cat([p.up for p in parts], 1))
        found: nn.Module = layer
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As any LoRA layer; merged adapters count whichever are active."""
        y: Tensor = super().forward(x, *args, **kwargs)
        for name in self.merged_adapters:
            down: Any = self.lora_A[name]
            up: Any = self.lora_B[name]
            y = y + (up(down(x.to(down.weight.dtype))) * self.scaling[name]).to(y.dtype)
        return y

    def low_rank(self, name: str) -> LowRank:
        """What an adapter adds to the weight."""
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        return LowRank(down.weight.detach().float(), up.weight.detach().float() * self.scaling[name])

    def why_not_merged(self, name: str) -> str:
        """Why an adapter cannot be merged exactly; empty if it can."""
        if name in self.lora_variant:
            return f"adapter {name} is more than a matrix of low rank ({type(self.lora_variant[name]).__name__})"
        if self.lora_bias.get(name):
            return f"adapter {name} has a bias"
        layer: Any = self.get_base_layer()
        parts: list[Any] = list(self.lora_A.values())
        return why_inexact(layer, sum(len(part.weight) for part in parts))


def extend() -> None:
    """Let PEFT merge into compressed layers only where that is exact. May be called any number of times."""
    if getattr(BaseTuner, "_cospadi_extended", False):
        return
    _then(LoraConfig, "__post_init__", _register)
    _then(BaseTuner, "_check_merge_allowed", _check)
    _then(BaseTuner, "_unload_and_optionally_merge", _store)
    setattr(BaseTuner, "_cospadi_extended", True)  # noqa: B010


def _then(kind: type, name: str, more: Callable[[Any], None]) -> None:
    """Let a method of a class also do something afterwards."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        more(self)
        return result

    setattr(kind, name, both)


def _register(config: LoraConfig) -> None:
    config._register_custom_module({ComputedLinear: StoredLora})


def _check(tuner: BaseTuner) -> None:
    """Refuse to merge before anything was merged, if an adapter cannot be merged exactly."""
    for module, layer in _adapted(tuner):
        if not isinstance(module, StoredLora):
            raise _refusal(layer, f"{type(module).__module__.split('.')[2]} adapters are not stored as they are")
        for name in module.lora_A:
            reason = module.why_not_merged(name)
            if reason:
                raise _refusal(layer, reason)


def _store(tuner: BaseTuner) -> None:
    """Store what waits to be stored, and describe the model anew, so that it can be saved."""
    model: Any = tuner.model
    layers: list[Any] = [m for m in model.modules() if isinstance(m, ComputedLinear) and hasattr(m, "waiting_update")]
    if not layers:
        return
    add_low_rank({layer: layer.waiting_update for layer in layers})
    for layer in layers:
        del layer.waiting_update
    quantizer = getattr(model, "hf_quantizer", None)
    stored = format_of(getattr(quantizer, "quantization_config", None))
    if quantizer is not None and stored is not None:
        described: Any = stored.parse(quantizer.quantization_config.to_dict())
        attach(model, [_spec(model.get_submodule(group.modules[0])) for group in described])


def _adapted(tuner: BaseTuner) -> Iterator[tuple[BaseTunerLayer, ComputedLinear]]:
    for module in tuner.model.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            if isinstance(layer, ComputedLinear):
                yield module, layer


def _spec(layer: Any) -> Any:
    return layer.spec if hasattr(layer, "spec") else layer.group


def _name(layer: Any) -> str:
    name: str = layer.name
    return name


def _refusal(layer: Any, reason: str) -> ModelError:
    return ModelError(
        f"{_name(layer)}: the adapter cannot be merged into the compressed layer without loss: {reason}. Nothing was "
        "merged; keep the adapter beside the compressed model, or save it, write the dense model with "
        "`cospadi export`, load the adapter there and merge"
    )


extend()
