"""A model as the rest of the package sees it: decoder layers and groups of linear layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cospadi.errors import NumericalError


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers with the same input (siblings), in the order in which the model calls them.

    Attributes:
        modules: full dotted names in the model.
        layer: index of the decoder layer they belong to.
        d_in: number of inputs.
        d_out: number of outputs of each layer.
    """

    modules: tuple[str, ...]
    layer: int
    d_in: int
    d_out: tuple[int, ...]

    @property
    def name(self) -> str:
        """Readable name: the first module's name, and the last part of the others' names."""
        return "+".join([self.modules[0], *(m.rsplit(".", 1)[-1] for m in self.modules[1:])])

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights at 16 bits each."""
        return 2 * self.d_in * sum(self.d_out)


@dataclass(frozen=True)
class ModelView:
    """A causal language model, real or on ``meta``, as decoder layers and linear groups.

    Attributes:
        model: the model.
        layers_name: dotted name of the list of decoder layers, for example ``"model.layers"``.
        groups: all groups, ordered by layer, then by first call.
        extra_outputs: number of values each layer returns besides the hidden states (None: it returns a bare tensor).
    """

    model: PreTrainedModel
    layers_name: str
    groups: tuple[LinearGroup, ...]
    extra_outputs: int | None = None

    @property
    def hidden_width(self) -> int:
        """Width of a token's hidden state."""
        return int(getattr(self.model.config.get_text_config(), "hidden_size", 0) or max(g.d_in for g in self.groups))

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers currently in the model."""
        return list(self.model.get_submodule(self.layers_name).children())

    @cached_property
    def module_names(self) -> tuple[str, ...]:
        """Names of the linear layers of all groups, in order."""
        return tuple(name for group in self.groups for name in group.modules)

    def outside(self) -> Iterator[nn.Module]:
        """Modules with parameters or buffers of their own that belong to no decoder layer."""
        inside = self.layers_name + "."
        for name, module in self.model.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and not name.startswith(inside) and not list(module.children()):
                yield module

    def of_layer(self, index: int) -> tuple[LinearGroup, ...]:
        """The groups of one decoder layer."""
        return tuple(group for group in self.groups if group.layer == index)

    def module(self, name: str) -> nn.Module:
        """The module currently at a dotted name."""
        return self.model.get_submodule(name)

    def weight(self, name: str) -> Tensor:
        """W (d_in, d_out) of a linear layer: a detached view in the model's dtype, no copy.

        Raises:
            TypeError: if the module has been replaced by one without a dense weight.
        """
        weight = self.module(name).weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} has no dense weight")
        return weight.detach().T

    def bias(self, name: str) -> Tensor | None:
        """The bias (d_out,) of a linear layer, detached; None without a bias."""
        bias = getattr(self.module(name), "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding (vocabulary, width); token ids must be on its device and below its length."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def check_weights(view: ModelView) -> None:
    """Check the weights and biases of all linear groups for NaN and Inf.

    Raises:
        NumericalError: naming the first such layer.
    """
    for name in view.module_names:
        for what, tensor in (("weight", view.weight(name)), ("bias", view.bias(name))):
            if tensor is None:
                continue
            bad = int(torch.count_nonzero(~tensor.isfinite()))
            if bad:
                raise NumericalError(
                    f"{name}: {bad} of {tensor.numel()} entries of the {what} are NaN or Inf; the model is damaged"
                )


def where_not_finite(model: PreTrainedModel) -> str:
    """The end of a message about NaN or Inf in a model's output: its cause, a damaged weight or an overflow."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            return f"; {name} contains NaN or Inf: the model is damaged"
    return "; its weights are finite, so activations overflow: use bfloat16 or float32 weights"
