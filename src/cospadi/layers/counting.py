"""How many weights a model with compressed layers stands for."""

from __future__ import annotations

from torch import nn

from cospadi.layers.factored_linear import FactoredLinear
from cospadi.layers.stored_layer import IntegerParameter


class WeightCount:
    """Takes the place of ``PreTrainedModel.num_parameters``, which counts words of packed integers as parameters.

    A compressed layer counts as the dense weight that it stands for, as transformers does for 4-bit models; guards
    count nothing. Trainable parameters are counted as they are stored. Copies and pickles of the model keep it, and
    layers that are dense again count as such.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights.

        Args:
            only_trainable: count parameters that require a gradient only.
            exclude_embeddings: leave out the weights of ``nn.Embedding`` layers.
        """
        left_out: set[int] = set()
        total = 0
        for module in self.model.modules():
            if isinstance(module, FactoredLinear) and not only_trainable:
                total += module.in_features * module.out_features
                left_out |= {id(parameter) for parameter in module.factor_parameters()}
            elif isinstance(module, nn.Embedding) and exclude_embeddings:
                left_out.add(id(module.weight))
        for parameter in self.model.parameters():
            if id(parameter) in left_out or isinstance(parameter, IntegerParameter):
                continue
            if parameter.requires_grad or not only_trainable:
                total += parameter.numel()
        return total


def count_weights(model: nn.Module) -> None:
    """Make ``num_parameters`` of a model, and of the models within it, count weights. May be called repeatedly."""
    for module in model.modules():
        if hasattr(type(module), "num_parameters") and "num_parameters" not in vars(module):
            setattr(module, "num_parameters", WeightCount(module))  # noqa: B010
