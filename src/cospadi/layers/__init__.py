"""The ``nn.Module`` of a compressed model."""

from cospadi.layers.factored_linear import FactoredLinear
from cospadi.layers.siblings import Siblings
from cospadi.layers.tensors import module_tensors

__all__ = ["FactoredLinear", "Siblings", "module_tensors"]
