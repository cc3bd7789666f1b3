"""The outputs of a whole group of layers in one operation, ``torch.ops.cospadi.factored_group``, for compiled programs.

A program receives the codes of each layer as separate tensors. When it runs, the operation checks whether they lie
behind each other in one storage (`cospadi.layers.siblings.joined`). If so, one product computes the whole group;
otherwise the product of each layer is computed separately.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.op import ROLES, by_role, checked, describe, factored_linear, optional_spec, parse


def factored_group(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Sequence[Packed],
    codes_spec: MatrixSpec,
) -> Tensor:
    """``y = (x D) S`` for all layers of a group side by side, without gradients.

    Args:
        x: (..., d_in), as `factored_linear` takes it.
        dictionary: stored tensors of Dᵀ, None for the identity.
        dictionary_spec: how Dᵀ is stored; None with `dictionary`.
        codes: stored tensors of each layer's rows of Sᵀ.
        codes_spec: how all these rows together are stored.

    Returns:
        (..., rows of all layers) in the dtype of x.

    Raises:
        ValueError, TypeError: as `factored_linear`.
    """
    x = checked(x, dictionary, dictionary_spec, codes, codes_spec)
    atoms = dictionary or {}
    y: Tensor = torch.ops.cospadi.factored_group(
        x,
        *(atoms.get(role) for role in ROLES),
        *([part[role] for part in codes if role in part] for role in ROLES),
        describe(dictionary_spec),
        describe(codes_spec),
    )
    return y


def as_one_matrix(parts: Sequence[Packed]) -> Packed | None:
    """The stored rows of several layers as one matrix, if they lie behind each other in one storage; otherwise None."""
    joined: Packed = {}
    for role, first in parts[0].items():
        begin, row = first.data_ptr(), first.stride(0) * first.element_size()
        rows = 0
        for part in parts:
            tensor = part[role]
            if tensor.data_ptr() != begin + rows * row or tensor.dtype != first.dtype or not tensor.is_contiguous():
                return None
            rows += tensor.shape[0]
        storage = first.untyped_storage()
        if begin + rows * row > storage.data_ptr() + storage.nbytes():  # separate storages that happen to be adjacent
            return None
        joined[role] = first.as_strided((rows, *first.shape[1:]), first.stride())
    return joined


@torch.library.custom_op("cospadi::factored_group", mutates_args=())
def _op(
    x: Tensor,
    dictionary_values: Tensor | None,
    dictionary_mask: Tensor | None,
    dictionary_scales: Tensor | None,
    dictionary_zeros: Tensor | None,
    codes_values: Sequence[Tensor],
    codes_mask: Sequence[Tensor],
    codes_scales: Sequence[Tensor],
    codes_zeros: Sequence[Tensor],
    dictionary_spec: str,
    codes_spec: str,
) -> Tensor:
    dictionary = by_role(dictionary_values, dictionary_mask, dictionary_scales, dictionary_zeros)
    lists = {"values": codes_values, "mask": codes_mask, "scales": codes_scales, "zeros": codes_zeros}
    parts = [{role: rows[index] for role, rows in lists.items() if rows} for index in range(len(codes_values))]
    spec, whole = optional_spec(dictionary_spec), parse(codes_spec)
    joined = as_one_matrix(parts)
    if joined is not None:
        return factored_linear(x, dictionary, spec, joined, whole)
    z = x if dictionary is None else factored_linear(x, None, None, dictionary, parse(dictionary_spec))
    # a row has a value or a scale of its own; with a trellis the values are tiles
    specs = (replace(whole, rows=part.get("scales", part["values"]).shape[0]) for part in parts)
    return torch.cat([factored_linear(z, None, None, part, own) for part, own in zip(parts, specs, strict=True)], -1)


@_op.register_fake
def _fake(x: Tensor, *rest: Tensor | Sequence[Tensor] | str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(str(rest[-1])).rows))
