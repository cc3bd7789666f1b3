"""The reference that every path of the operation is tested against: unpacked factors, products in float64."""

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed, unpack


def reference(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed,
    codes_spec: MatrixSpec,
) -> Tensor:
    """``(x D) S`` in float64, on the device of x.

    Args:
        x: (..., d_in), any float.
        dictionary: stored tensors of Dᵀ (atoms, d_in), or None for the identity.
        dictionary_spec: how Dᵀ is stored.
        codes: stored tensors of Sᵀ (rows, atoms).
        codes_spec: how Sᵀ is stored.

    Returns:
        (..., rows) float64.
    """
    y = x.to(torch.float64)
    if dictionary is not None and dictionary_spec is not None:
        y = y @ unpack(dictionary, dictionary_spec, torch.float64).T
    return y @ unpack(codes, codes_spec, torch.float64).T
