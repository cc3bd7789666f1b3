"""Swap dense layers for factored ones and fill them; swap back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.errors import ModelError
from cospadi.format import FORMAT_VERSION, Factors, GroupSpec, Packed, pack
from cospadi.layers import FactoredLinear, count_weights
from cospadi.layers.tensors import codes_name, dictionary_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def storage_dtype(model: PreTrainedModel) -> torch.dtype:
    """The 16-bit float in which a model's factors are stored: float16 for float16 models, else bfloat16."""
    return torch.float16 if model.dtype == torch.float16 else torch.bfloat16


def factored_layers(model: nn.Module) -> list[FactoredLinear]:
    """Every factored layer of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, FactoredLinear)]


def replace_modules(model: PreTrainedModel, groups: Sequence[GroupSpec], dtype: torch.dtype | None = None) -> None:
    """Swap the groups' ``nn.Linear`` modules for factored layers with unset tensors.

    Biases are kept. The layers lie where the linear layers lay (``meta`` included). The first module of the first
    group gets the guard tensor, so give all groups in one call. A group that is already in place is left alone.

    Args:
        model: changed in place.
        groups: which modules, and how they are stored.
        dtype: of the floating-point factor tensors; None for that of the model.

    Raises:
        ModelError: if a module is missing, is no ``nn.Linear``, or has another shape.
    """
    for group in groups:
        _swap(model, group, dtype or model.dtype)
    place_guard(model, groups)


def place_guard(model: nn.Module, groups: Sequence[GroupSpec]) -> None:
    """Give the guard tensor to the first module of the first group, and to no other."""
    for layer in factored_layers(model):
        layer.drop_guard()
    if groups:
        first = model.get_submodule(groups[0].modules[0])
        assert isinstance(first, FactoredLinear)
        first.add_guard()


def _swap(model: PreTrainedModel, group: GroupSpec, dtype: torch.dtype) -> None:
    if _in_place(model, group):
        return
    layers = [_factored(group, index, _module(model, name), dtype) for index, name in enumerate(group.modules)]
    FactoredLinear.link(layers)
    for name, layer in zip(group.modules, layers, strict=True):
        _untie(model, name)
        model.set_submodule(name, layer)
    count_weights(model)


def _in_place(model: nn.Module, group: GroupSpec) -> bool:
    found = [_module(model, name) for name in group.modules]
    return all(isinstance(module, FactoredLinear) and module.group == group for module in found)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{name}: the model {type(model).__name__} has no such module") from None


def _factored(group: GroupSpec, index: int, module: nn.Module, dtype: torch.dtype) -> FactoredLinear:
    name, expected = group.modules[index], (group.d_out[index], group.d_in)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{name}: a {type(module).__name__} cannot be compressed, only nn.Linear")
    if tuple(module.weight.shape) != expected:
        raise ModelError(f"{name}: the layer is {tuple(module.weight.shape)}, its group says {expected}")
    layer = FactoredLinear(group, index, bias=False, device=module.weight.device, dtype=dtype)
    if module.bias is not None:
        layer.bias = module.bias
    layer.train(module.training)
    return layer


def _untie(model: PreTrainedModel, name: str) -> None:
    """A compressed head or embedding no longer shares the other's weight."""
    shares = [key for key, other in _ties(model).items() if name in (key.rpartition(".")[0], other.rpartition(".")[0])]
    if not shares:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {key: other for key, other in _ties(model).items() if key not in shares}


def _ties(model: PreTrainedModel) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


@torch.no_grad()
def install_packed(model: PreTrainedModel, spec: GroupSpec, dictionary: Packed | None, codes: Packed) -> None:
    """Fill the layers of one group with packed tensors.

    Args:
        model: its modules of the group are swapped first where they are still dense.
        spec: the group.
        dictionary: by role; None for an identity dictionary.
        codes: by role, the rows of all modules one after the other.

    Raises:
        ModelError: if a module does not fit the group.
        ValueError: if a tensor has another shape or dtype than the group says.
    """
    _swap(model, spec, model.dtype)
    layers = [_module(model, name) for name in spec.modules]
    if dictionary is not None:
        for role, tensor in dictionary.items():
            _fill(layers[0], dictionary_name(role), tensor)
    begin = 0
    for layer, rows in zip(layers, spec.d_out, strict=True):
        for role, tensor in codes.items():
            _fill(layer, codes_name(role), tensor[begin : begin + rows])
        begin += rows


def install(model: PreTrainedModel, spec: GroupSpec, factors: Factors) -> None:
    """Pack the factors of one group into its layers, rounded to the 16-bit float of the model.

    The layers of a float32 model hold the rounded numbers in float32, so that the model computes as before; `save`
    stores them in 16 bits.

    Raises:
        ModelError: if a module does not fit the group.
        ValueError: if the factors do not fit the group.
    """
    dtype = storage_dtype(model)
    if (spec.dictionary is None) != (factors.dictionary is None):
        raise ValueError(f"{spec.name}: the group and its factors disagree on whether there is a dictionary")
    dictionary = None
    if spec.dictionary is not None and factors.dictionary is not None:
        dictionary = pack(factors.dictionary, spec.dictionary, dtype)
    install_packed(model, spec, dictionary, pack(factors.codes, spec.codes, dtype))


def _fill(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parameter = layer._parameters.get(name)
    if (
        parameter is None
        or parameter.shape != tensor.shape
        or parameter.is_floating_point() != tensor.is_floating_point()
    ):
        raise ValueError(f"{name}: a tensor {tensor.dtype} {list(tensor.shape)} does not fit {layer}")
    value = tensor.to(parameter.dtype) if parameter.is_floating_point() else tensor
    if parameter.device.type == "meta":
        layer._parameters[name] = nn.Parameter(value.clone(), False)
    else:
        parameter.copy_(value)


def quantization_config(groups: Sequence[GroupSpec]) -> dict[str, Any]:
    """What stands in ``config.json``: all that is needed to read the tensors, and nothing else."""
    return {
        "quant_method": "cospadi",
        "format_version": FORMAT_VERSION,
        "groups": [group.to_dict() for group in groups],
    }


def replace_by_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Swap every factored layer back for an ``nn.Linear`` of the weight it stands for.

    Args:
        model: changed in place.
        dtype: of weights and biases; None for that of the layer's floating-point parameters.

    Raises:
        ModelError: if a layer is offloaded to disk or to the CPU by hooks.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FactoredLinear)]
    for name, layer in layers:
        if any(p.device.type == "meta" for p in (layer.values, *(layer.packed_dictionary() or {}).values())):
            raise ModelError(f"{name}: offloaded layers cannot be made dense; load the model without offloading")
    made = {name: _dense(layer, dtype) for name, layer in layers}
    for name, linear in made.items():
        model.set_submodule(name, linear)


def _dense(layer: FactoredLinear, dtype: torch.dtype | None) -> nn.Linear:
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
