"""Names of a compressed layer's tensors: the one place that maps roles (values, mask, scales …) to parameters."""

import torch

from cospadi.format.rotation import Rotation
from cospadi.format.schema import MatrixSpec

TensorTable = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by parameter name."""


def dictionary_name(role: str) -> str:
    """Parameter that holds a role (values, mask, scales, zeros) of the dictionary."""
    return "dictionary" if role == "values" else f"dictionary_{role}"


def codes_name(role: str) -> str:
    """Parameter that holds a role (values, mask, scales, zeros) of the codes."""
    return role if role in ("values", "mask") else f"values_{role}"


def rotation_name(role: str) -> str:
    """Parameter that holds a role (signs, scales) of the rotation."""
    return f"rotation_{role}"


def rotation_tensors(rotation: Rotation, d_in: int, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of a rotation's parameters, by parameter name."""
    return {rotation_name(role): shape for role, shape in rotation.tensors(d_in, dtype).items()}


def dictionary_tensors(spec: MatrixSpec, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of a dictionary's parameters, by parameter name."""
    return {dictionary_name(role): shape for role, shape in spec.tensors(dtype).items()}


def codes_tensors(spec: MatrixSpec, dtype: torch.dtype) -> TensorTable:
    """Shapes and dtypes of the parameters of one module's codes, by parameter name."""
    return {codes_name(role): shape for role, shape in spec.tensors(dtype).items()}
