"""Which tensors a compressed layer holds, by name: the one place that maps roles to parameter names."""

import torch

from cospadi.format import GroupSpec, MatrixSpec

TensorTable = dict[str, tuple[tuple[int, ...], torch.dtype]]
Roles = tuple[tuple[str, str], ...]

# An empty promise under the name of the dense weight: a reader that does not know the format builds a dense layer,
# finds a weight of another shape and stops, instead of going on with random weights (docs/format.md).
GUARD = "weight"
GUARD_SHAPE = (1,)
GUARD_DTYPE = torch.uint8


def dictionary_name(role: str) -> str:
    """Parameter that holds a role (values, mask, scales, zeros) of the dictionary."""
    return "dictionary" if role == "values" else f"dictionary_{role}"


def codes_name(role: str) -> str:
    """Parameter that holds a role (values, mask, scales, zeros) of the codes."""
    return role if role in ("values", "mask") else f"values_{role}"


def dictionary_roles(spec: MatrixSpec) -> Roles:
    """Roles that a dictionary's stored tensors have, each with the parameter that holds it."""
    return tuple((role, dictionary_name(role)) for role in spec.tensors())


def codes_roles(spec: MatrixSpec) -> Roles:
    """The same for codes."""
    return tuple((role, codes_name(role)) for role in spec.tensors())


def dictionary_tensors(spec: MatrixSpec, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of a dictionary's parameters, by parameter name."""
    return {dictionary_name(role): shape for role, shape in spec.tensors(dtype).items()}


def codes_tensors(spec: MatrixSpec, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of the parameters of one module's codes, by parameter name."""
    return {codes_name(role): shape for role, shape in spec.tensors(dtype).items()}


def module_tensors(group: GroupSpec, index: int, dtype: torch.dtype = torch.bfloat16) -> TensorTable:
    """Factor tensors of one module of a group, bias and guard excluded.

    Args:
        group: the group.
        index: which of `group.modules`; the first one also holds the dictionary.
        dtype: of the floating-point tensors.

    Returns:
        shape and dtype by parameter name.
    """
    table: TensorTable = {}
    if index == 0 and group.dictionary is not None:
        table |= dictionary_tensors(group.dictionary, dtype)
    return table | codes_tensors(group.module_codes(index), dtype)
