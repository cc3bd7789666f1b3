"""The ``nn.Module``s of compressed and pruned models."""

from cospadi.layers.computed_linear import ComputedLinear, is_dense_linear
from cospadi.layers.counting import WeightCount, count_weights
from cospadi.layers.factored_linear import FactoredLinear
from cospadi.layers.siblings import Siblings
from cospadi.layers.stored_layer import IntegerParameter, StoredLayer

__all__ = [
    "ComputedLinear", "FactoredLinear", "IntegerParameter", "Siblings", "StoredLayer", "WeightCount", "count_weights",
    "is_dense_linear",
]  # fmt: skip
