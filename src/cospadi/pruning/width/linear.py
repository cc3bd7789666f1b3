"""Linear layers of a block: look up by name, replace by ones of another shape."""

from __future__ import annotations

from torch import Tensor, nn

from cospadi.layers import is_dense_linear


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """A linear layer by name.

    Raises:
        TypeError: if the module of that name is not one.
    """
    linear = module.get_submodule(name)
    if not is_dense_linear(linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a dense nn.Linear")
    return linear


def replace_linear(layer: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Replace a linear layer by one with other weights, of any shape, in its dtype and on its device.

    Args:
        layer: the decoder layer; changed in place.
        name: of the linear layer within it.
        weight: (d_out, d_in), any float dtype.
        bias: (d_out,), or None.
    """
    old = linear_of(layer, name)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=old.weight.dtype)
    new.weight = nn.Parameter(weight.to(old.weight, copy=True), old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(old.weight, copy=True), old.weight.requires_grad)
    new.train(old.training)
    layer.set_submodule(name, new)
