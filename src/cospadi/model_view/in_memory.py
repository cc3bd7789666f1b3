"""Models that are in memory already: what they are called, and copies that a run may change."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cospadi.errors import ModelError
from cospadi.model_view.classes import model_class
from cospadi.model_view.loading import open_config, open_tokenizer
from cospadi.model_view.locating import is_here, model_name, source_name
from cospadi.runtime.devices import compute_dtype, placed
from cospadi.runtime.memory import guard_memory


@dataclass(frozen=True)
class InMemory:
    """A model that is in memory already. Nothing here changes it.

    Attributes:
        model: of the user.
        tokenizer: of the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """What reports call it."""
        return model_label(self.model)

    def __str__(self) -> str:
        return self.name

    def copied(self) -> PreTrainedModel:
        """A copy on the CPU in evaluation mode, without hooks and gradients; tied weights stay tied.

        Raises:
            ModelError: if the model is quantised.
            ResourceError: if there is not enough memory.
        """
        if getattr(self.model, "is_quantized", False):
            raise ModelError(
                f"{self.name} is quantised already: load its original weights, without quantization_config"
            )
        memo: dict[int, Any] = {}
        with guard_memory(f"copying {self.name}", "save it, and name its directory instead"):
            for parameter in self.model.parameters():
                weight = parameter.detach().to("cpu", copy=True)
                memo[id(parameter)] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
            for buffer in self.model.buffers():
                memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
            model = copy.deepcopy(self.model, memo)
        _without_hooks(model)
        model.train(False)
        return model

    @contextmanager
    def lent(self, device: torch.device | None) -> Iterator[PreTrainedModel]:
        """The model itself, in evaluation mode and the float type that a loaded one gets; afterwards it is as it was.

        Args:
            device: where it shall run; None: where it is.

        Raises:
            ModelError: if its layers are on several devices.
        """
        if len({*(getattr(self.model, "hf_device_map", None) or {}).values()}) > 1:
            raise ModelError(f"{self.name} is spread over several devices: load it onto one")
        training = [module for module in self.model.modules() if module.training]
        self.model.train(False)
        try:
            place = device or self.model.device
            size = sum(p.numel() * p.element_size() for p in self.model.parameters())
            with placed(self.model, place, compute_dtype(size, place)):
                yield self.model
        finally:
            for module in training:
                module.training = True


Source = str | InMemory
"""A directory or hub id, or a model in memory."""


def name_of(source: Source) -> str:
    """What reports call a model."""
    return source.name if isinstance(source, InMemory) else model_name(source)


def model_source(model: object, tokenizer: object = None) -> Source:
    """What a function was given as its model.

    Args:
        model: a local directory, a hub id, or a transformers model.
        tokenizer: of a model in memory: the tokenizer, or where to read it.

    Raises:
        ModelError: if it is none of these, if a model in memory has no tokenizer or cannot be used, or if a directory
            comes with a tokenizer.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, (str, os.PathLike)):
        model = model if isinstance(model, str) else Path(model)
        if tokenizer is not None:
            raise ModelError(f"{model}: tokenizer goes with a model in memory; a directory or hub id has its own")
        return source_name(model)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(_not_a_model(model))
    _check_in_memory(model)
    name = str(model.name_or_path or "") or "DIR"
    if tokenizer is None:
        raise ModelError(
            f"a model in memory ({type(model).__name__}) needs its tokenizer: pass "
            f"tokenizer=AutoTokenizer.from_pretrained({name!r})"
        )
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = open_tokenizer(os.fspath(tokenizer))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = getattr(tokenizer, "tokenizer", None)
        hint = "pass its .tokenizer" if isinstance(inner, PreTrainedTokenizerBase) else "load it with AutoTokenizer"
        raise ModelError(f"tokenizer must be one of transformers, not a {type(tokenizer).__name__}: {hint}")
    return InMemory(model, tokenizer)


def config_of(model: object) -> tuple[PreTrainedConfig, str]:
    """The configuration of a model that need not be read, and the model's name; a model in memory needs no tokenizer.

    Raises:
        ModelError: if there is no readable configuration.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        config = _config_of_class(model)
        config.dtype = model.dtype  # it may have been cast since it was loaded
        if not is_here(str(config.name_or_path or "")):
            config.name_or_path = ""
        return config, model_label(model)
    source = model_source(model)
    assert isinstance(source, str)
    return open_config(source), model_name(source)


def kind_of(model: object) -> type[PreTrainedModel]:
    """The class of a model that need not be read; one in memory needs no tokenizer.

    Raises:
        ModelError: if there is no readable configuration, or the class is not supported.
    """
    model = getattr(model, "_orig_mod", model)
    model = model.model if isinstance(model, InMemory) else model
    return type(model) if isinstance(model, PreTrainedModel) else model_class(config_of(model)[0])[0]


def model_label(model: PreTrainedModel) -> str:
    """What reports call a model in memory: the name under which it was loaded, otherwise its class."""
    name = str(model.name_or_path or "")
    if not name:
        return type(model).__name__
    found = model_name(name)
    return PurePath(found).name if PurePath(found).is_absolute() else found


def _not_a_model(model: object) -> str:
    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        return f"{kind} is a model with an adapter: pass what its merge_and_unload() returns"
    expected = "expected a model's directory or hub id, or a transformers model with tokenizer=…"
    return f"{expected}, not a {kind}"


def _config_of_class(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of a model's configuration that names its class, as when it is saved."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def _check_in_memory(model: PreTrainedModel) -> None:
    """Refuse models of classes that are not supported, and those whose weights are not what their layers hold.

    Raises:
        ModelError: if it is no decoder, or if weights are offloaded, quantised, or have an adapter beside them.
    """
    name = type(model).__name__
    model_class(_config_of_class(model))
    absent = next((key for key, tensor in model.named_parameters() if tensor.device.type == "meta"), None)
    if absent is not None:
        raise ModelError(
            f"{name}: {absent} has no values in memory (it is offloaded): load the model without device_map"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name} has an adapter: merge it first (peft's merge_and_unload), and pass that model")


def _without_hooks(model: nn.Module) -> None:
    """Remove the hooks by which accelerate moves inputs between devices: the copy is on one."""
    from accelerate.hooks import remove_hook_from_module

    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        remove_hook_from_module(model, recurse=True)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
