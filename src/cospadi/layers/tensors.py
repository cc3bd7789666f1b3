"""Which tensors a compressed layer holds, by name: the one place that maps roles to parameter names."""

import torch

from cospadi.format import GroupSpec, MatrixSpec
from cospadi.format.leaves import TensorTable, codes_name, codes_tensors, dictionary_name, dictionary_tensors

__all__ = [
    "GUARD",
    "GUARD_DTYPE",
    "GUARD_SHAPE",
    "TensorTable",
    "codes_name",
    "codes_roles",
    "codes_tensors",
    "dictionary_name",
    "dictionary_roles",
    "dictionary_tensors",
    "module_tensors",
]

Roles = tuple[tuple[str, str], ...]

# An empty promise under the name of the dense weight: a reader that does not know the format builds a dense layer,
# finds a weight of another shape and stops, instead of going on with random weights (docs/format.md).
GUARD = "weight"
GUARD_SHAPE = (1,)
GUARD_DTYPE = torch.uint8


def dictionary_roles(spec: MatrixSpec) -> Roles:
    """Roles that a dictionary's stored tensors have, each with the parameter that holds it."""
    return tuple((role, dictionary_name(role)) for role in spec.tensors())


def codes_roles(spec: MatrixSpec) -> Roles:
    """The same for codes."""
    return tuple((role, codes_name(role)) for role in spec.tensors())


def module_tensors(group: GroupSpec, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
    """Factor tensors of one module of a group, bias and guard excluded; see :meth:`GroupSpec.tensors`."""
    return group.tensors(index, dtype)
