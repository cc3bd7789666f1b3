"""Which tensors a compressed layer holds, by name: the one place that maps roles to parameter names."""

import torch

from cospadi.format import GroupSpec, MatrixSpec

TensorTable = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by parameter name."""
Roles = tuple[tuple[str, str], ...]
"""Roles of stored tensors (values, mask, scales, zeros), each with the name of the parameter that holds it."""

# A one-byte tensor under the name of the dense weight. A reader that does not know the format builds a dense layer,
# finds a weight of another shape and stops, instead of continuing with random weights (docs/format.md).
GUARD = "weight"
GUARD_SHAPE = (1,)
GUARD_DTYPE = torch.uint8


def dictionary_name(role: str) -> str:
    """Name of the parameter that holds a role (values, mask, scales, zeros) of the dictionary."""
    return "dictionary" if role == "values" else f"dictionary_{role}"


def codes_name(role: str) -> str:
    """Name of the parameter that holds a role (values, mask, scales, zeros) of the codes."""
    return role if role in ("values", "mask") else f"values_{role}"


def dictionary_roles(spec: MatrixSpec) -> Roles:
    """Roles of a dictionary's stored tensors, with their parameter names."""
    return tuple((role, dictionary_name(role)) for role in spec.tensors())


def codes_roles(spec: MatrixSpec) -> Roles:
    """Roles of the codes' stored tensors, with their parameter names."""
    return tuple((role, codes_name(role)) for role in spec.tensors())


def dictionary_tensors(spec: MatrixSpec, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of a dictionary's parameters; `dtype` is that of the floating-point ones."""
    return {dictionary_name(role): shape for role, shape in spec.tensors(dtype).items()}


def codes_tensors(spec: MatrixSpec, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of the parameters of one module's codes; `dtype` is that of the floating-point ones."""
    return {codes_name(role): shape for role, shape in spec.tensors(dtype).items()}


def module_tensors(group: GroupSpec, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
    """Shapes and dtypes of the factor tensors of one module of a group, without bias and guard.

    Args:
        group: the group.
        index: of the module in `group.modules`; the first module also holds the dictionary.
        dtype: of the floating-point tensors.

    Returns:
        Shape and dtype by parameter name.
    """
    table: TensorTable = {}
    if index == 0 and group.dictionary is not None:
        table |= dictionary_tensors(group.dictionary, dtype)
    return table | codes_tensors(group.module_codes(index), dtype)
