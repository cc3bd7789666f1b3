"""The guard tensor, and which parameter of a factored layer holds which role."""

import torch

from cospadi.format import GroupSpec, MatrixSpec
from cospadi.format.leaves import codes_name, dictionary_name, rotation_name

Roles = tuple[tuple[str, str], ...]
"""Roles of stored tensors (values, mask, scales …), each with the name of the parameter that holds it."""

# A one-byte tensor under the name of the dense weight. A reader that does not know the format builds a dense layer,
# finds a weight of another shape and stops, instead of continuing with random weights (docs/format.md).
GUARD = "weight"
GUARD_SHAPE = (1,)
GUARD_DTYPE = torch.uint8


def dictionary_roles(spec: MatrixSpec) -> Roles:
    """Roles of a dictionary's stored tensors, with their parameter names."""
    return tuple((role, dictionary_name(role)) for role in spec.tensors())


def codes_roles(spec: MatrixSpec) -> Roles:
    """Roles of the codes' stored tensors, with their parameter names."""
    return tuple((role, codes_name(role)) for role in spec.tensors())


def rotation_roles(group: GroupSpec) -> Roles:
    """Roles of the stored tensors of a group's rotation, with their parameter names; none without a rotation."""
    return () if group.rotation is None else tuple((r, rotation_name(r)) for r in group.rotation.tensors(group.d_in))
