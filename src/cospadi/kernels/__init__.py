"""The operation of a compressed layer, ``y = (x D) S``, computed directly from the stored tensors."""

from cospadi.kernels.group_op import factored_group
from cospadi.kernels.op import describe, factored_linear, is_traced, parse
from cospadi.kernels.reference import reference

__all__ = ["describe", "factored_group", "factored_linear", "is_traced", "parse", "reference"]
