"""Checkpoints of layers with shared atoms: description, checks, saving, filling, and the way back to dense layers.

``quantization_config`` is ``{"quant_method": "cospadi_masa", "format_version": 1, "groups": […]}`` with a group as in
:meth:`~cospadi.layers.shared_linear.SharedSpec.to_dict`, and optionally ``"compose": true``: whoever loads it gets
dense layers. The tensors are those of :class:`~cospadi.layers.shared_linear.SharedLinear`, by their parameter names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cospadi.checkpoint.checksums import check_checksums
from cospadi.checkpoint.convert import storage_dtype
from cospadi.checkpoint.formats.factored import FLOATS
from cospadi.checkpoint.headers import Entry, read_directory, read_json
from cospadi.errors import CheckpointError, ModelError
from cospadi.layers.shared_linear import SharedLinear, SharedSpec
from cospadi.layers.tensors import GUARD, GUARD_DTYPE, GUARD_SHAPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "cospadi_masa"
FORMAT_VERSION = 1


def shared_config(specs: Sequence[SharedSpec], compose: bool = False) -> dict[str, Any]:
    """What stands in ``config.json``."""
    data = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "groups": [spec.to_dict() for spec in specs],
    }
    return data | ({"compose": True} if compose else {})


def is_shared(data: Any) -> bool:
    """Whether a ``quantization_config`` (JSON object, or as transformers holds it) is of this format."""
    found = data.get("quant_method") if isinstance(data, Mapping) else getattr(data, "quant_method", None)
    return bool(found == QUANT_METHOD)


def parse_shared(data: Any, where: str = "config.json") -> tuple[SharedSpec, ...]:
    """Groups of a ``quantization_config``.

    Args:
        data: the JSON object.
        where: file, for messages.

    Raises:
        CheckpointError: if it is not of this format, of an unknown version, or impossible.
    """
    if not isinstance(data, Mapping) or not is_shared(data):
        raise CheckpointError(f"{where}: quantization_config is not one of layers with shared atoms")
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format version {version!r} is unknown (known: {FORMAT_VERSION}); upgrade cospadi"
        )
    unknown = set(data) - {"quant_method", "format_version", "groups", "compose"}
    if unknown:
        raise CheckpointError(f"{where}: unknown keys {sorted(unknown)} in quantization_config")
    if not isinstance(data.get("groups"), list) or not data["groups"]:
        raise CheckpointError(f"{where}: quantization_config has no groups")
    specs = []
    for number, item in enumerate(data["groups"]):
        try:
            specs.append(SharedSpec.from_dict(item))
        except ValueError as error:
            raise CheckpointError(f"{where}: group {number} of quantization_config is wrong: {error}") from None
    names = [name for spec in specs for name in spec.modules]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{where}: module {twice} belongs to two groups")
    return tuple(specs)


def read_shared_config(path: str | Path) -> tuple[SharedSpec, ...]:
    """Groups of a checkpoint directory, from its ``config.json``.

    Raises:
        CheckpointError: see :func:`parse_shared`.
    """
    file = Path(path) / "config.json"
    return parse_shared(read_json(file).get("quantization_config"), str(file))


def check_shared_headers(entries: Mapping[str, Entry], specs: Sequence[SharedSpec], where: Path) -> None:
    """Check that every tensor of the groups is there with its shape and dtype, and no other.

    Args:
        entries: tensors on disk, by full name.
        specs: the description.
        where: the directory, for messages.

    Raises:
        CheckpointError: naming file and tensor.
    """
    owned: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        owned.setdefault(module, {})[leaf] = entry
    for number, spec in enumerate(specs):
        for index, module in enumerate(spec.modules):
            found = dict(owned.get(module, {}))
            wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
                leaf: (shape, FLOATS) for leaf, (shape, _) in spec.tensors(index).items()
            }
            if "bias" in found:
                wanted["bias"] = ((spec.d_out,), FLOATS)
            if number == index == 0:
                wanted[GUARD] = (GUARD_SHAPE, (GUARD_DTYPE,))
            for leaf, (shape, dtypes) in wanted.items():
                if leaf not in found:
                    raise CheckpointError(f"{where}: tensor {module}.{leaf} is missing")
                entry = found.pop(leaf)
                if entry.shape != shape or entry.dtype not in dtypes:
                    raise CheckpointError(
                        f"{entry.file}: tensor {module}.{leaf} is {entry.dtype} {list(entry.shape)}, expected "
                        f"{list(shape)} for {spec.atoms} atoms and rank {spec.ranks[index]} of config.json"
                    )
            for leaf, extra in found.items():
                raise CheckpointError(f"{extra.file}: tensor {module}.{leaf} is not of a layer with shared atoms")


def validate_shared(path: str | Path, *, deep: bool = True) -> tuple[SharedSpec, ...]:
    """Check a checkpoint directory without building the model.

    Args:
        path: the directory.
        deep: also compare the files with ``SHA256SUMS``.

    Returns:
        its groups.

    Raises:
        CheckpointError: naming file and tensor.
    """
    directory = Path(path)
    specs = read_shared_config(directory)
    check_shared_headers(read_directory(directory), specs, directory)
    if deep:
        check_checksums(directory)
    return specs


def shared_layers(model: nn.Module) -> list[tuple[str, SharedLinear]]:
    """Every layer of shared atoms of a model with its name, in the order of the modules."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SharedLinear)]


def replace_shared(model: PreTrainedModel, specs: Sequence[SharedSpec], dtype: torch.dtype | None = None) -> None:
    """Swap the groups' ``nn.Linear`` modules for layers of shared atoms with unset tensors; biases are kept.

    Args:
        model: changed in place.
        specs: all groups; the first module of the first one gets the guard tensor.
        dtype: of the new tensors; None for that of the model.

    Raises:
        ModelError: if a module is missing, is no ``nn.Linear``, or has another shape.
    """
    for spec in specs:
        layers = [_shared(model, spec, index, dtype or model.dtype) for index in range(len(spec.modules))]
        SharedLinear.link(layers)
        for name, layer in zip(spec.modules, layers, strict=True):
            model.set_submodule(name, layer)
    for _, layer in shared_layers(model):
        layer.drop_guard()
    first = model.get_submodule(specs[0].modules[0])
    assert isinstance(first, SharedLinear)
    first.add_guard()


def _shared(model: nn.Module, spec: SharedSpec, index: int, dtype: torch.dtype) -> SharedLinear:
    name = spec.modules[index]
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{name}: the model {type(model).__name__} has no such module") from None
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{name}: a {type(module).__name__} cannot be compressed, only nn.Linear")
    if tuple(module.weight.shape) != (spec.d_out, spec.d_in):
        raise ModelError(f"{name}: the layer is {tuple(module.weight.shape)}, its group says {(spec.d_out, spec.d_in)}")
    layer = SharedLinear(spec, index, device=module.weight.device, dtype=dtype)
    layer.bias = module.bias
    layer.train(module.training)
    return layer


@torch.no_grad()
def install_shared(model: PreTrainedModel, spec: SharedSpec, tensors: Mapping[str, Tensor]) -> None:
    """Fill the layers of one group.

    Args:
        model: its modules of the group have been swapped.
        spec: the group.
        tensors: ``"{index}.{parameter}"`` of every module.

    Raises:
        ValueError: if a tensor is missing or has another shape than the group says.
    """
    for index, name in enumerate(spec.modules):
        layer = model.get_submodule(name)
        assert isinstance(layer, SharedLinear)
        for leaf, parameter in layer.factors().items():
            tensor = tensors.get(f"{index}.{leaf}")
            if tensor is None or tensor.shape != parameter.shape:
                there = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise ValueError(f"{name}.{leaf} is {there}, expected {list(parameter.shape)}")
            if parameter.device.type == "meta":
                layer._parameters[leaf] = nn.Parameter(tensor.to(parameter.dtype, copy=True), False)
            else:
                parameter.copy_(tensor)


def compose_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Swap every layer of shared atoms for an ``nn.Linear`` of its weight: faster, and as large as the original.

    Args:
        model: changed in place.
        dtype: of weights and biases; None for that of the layer's parameters.

    Raises:
        ModelError: if a layer is offloaded to disk or to the CPU by hooks.
    """
    found = shared_layers(model)
    for name, layer in found:
        if any(p.device.type == "meta" for p in layer.factors().values()):
            raise ModelError(f"{name}: offloaded layers cannot be composed; load the model without offloading")
    made = {name: _dense(layer, dtype) for name, layer in found}
    for name, linear in made.items():
        model.set_submodule(name, linear)


def _dense(layer: SharedLinear, dtype: torch.dtype | None) -> nn.Linear:
    weight = layer.dense_weight(dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    linear.train(layer.training)
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:  # a model spread over devices: the hook brings inputs to the layer's device
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(layer)
        add_hook_to_module(linear, hook)
    return linear


@contextmanager
def sixteen_bits(model: PreTrainedModel) -> Iterator[None]:
    """Hold the factors in the 16-bit float of the model for a while."""
    dtype = storage_dtype(model)
    kept: list[tuple[SharedLinear, str, nn.Parameter]] = []
    for _, layer in shared_layers(model):
        for leaf, parameter in layer.factors().items():
            if parameter.dtype != dtype and parameter.device.type != "meta":
                kept.append((layer, leaf, parameter))
    try:
        for layer, leaf, parameter in kept:
            layer._parameters[leaf] = nn.Parameter(parameter.detach().to(dtype), False)
        yield
    finally:
        for layer, leaf, parameter in kept:
            layer._parameters[leaf] = parameter
