"""The ``nn.Module``s of compressed and pruned models."""

from cospadi.layers.counting import WeightCount, count_weights
from cospadi.layers.factored_linear import FactoredLinear
from cospadi.layers.siblings import Siblings
from cospadi.layers.stored_layer import IntegerParameter, StoredLayer

__all__ = [
    "FactoredLinear", "IntegerParameter", "Siblings", "StoredLayer", "WeightCount", "count_weights",
]  # fmt: skip
