"""All outputs of a group of layers at once, as a compiler sees them: ``torch.ops.cospadi.factored_group``.

A compiled program gets the codes of every layer as tensors of their own. Whether they lie behind each other in one
storage (`cospadi.layers.siblings`) is seen when the program runs: then one product serves the whole group. If they do
not, or no longer, each layer's product is computed by itself.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.op import by_role, checked, describe, factored_linear, optional_spec, parse

_ROLES = ("values", "mask", "scales", "zeros")


def factored_group(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Sequence[Packed],
    codes_spec: MatrixSpec,
) -> Tensor:
    """``y = (x D) S`` of all layers of a group side by side, without gradients.

    Args:
        x: (..., d_in), as `factored_linear` takes it.
        dictionary: stored tensors of Dᵀ, None for the identity.
        dictionary_spec: how Dᵀ is stored; None with `dictionary`.
        codes: stored tensors of every layer's rows of Sᵀ.
        codes_spec: how all rows of Sᵀ together are stored.

    Returns:
        (..., rows of all layers) in the dtype of x.

    Raises:
        ValueError, TypeError: as `factored_linear`.
    """
    x = checked(x, dictionary, dictionary_spec, codes, codes_spec)
    atoms = dictionary or {}
    y: Tensor = torch.ops.cospadi.factored_group(
        x,
        *(atoms.get(role) for role in _ROLES),
        *([part[role] for part in codes if role in part] for role in _ROLES),
        describe(dictionary_spec),
        describe(codes_spec),
    )
    return y


def as_one_matrix(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie behind each other in one storage as one tensor, along the first dimension; else None."""
    first = parts[0]
    step, place, home = first.stride(0), first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == home and part.dtype == first.dtype
        if not (same and part.is_contiguous() and part.storage_offset() == place):
            return None
        place += part.shape[0] * step
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


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
    spec, whole = optional_spec(dictionary_spec), parse(codes_spec)
    lists = {"values": codes_values, "mask": codes_mask, "scales": codes_scales, "zeros": codes_zeros}
    lists = {role: tensors for role, tensors in lists.items() if tensors}
    joined = {role: one for role, tensors in lists.items() if (one := as_one_matrix(tensors)) is not None}
    if len(joined) == len(lists):
        return factored_linear(x, dictionary, spec, joined, whole)
    z = x if dictionary is None or spec is None else factored_linear(x, None, None, dictionary, spec)
    products = []
    for index, values in enumerate(codes_values):
        part = {role: tensors[index] for role, tensors in lists.items()}
        products.append(factored_linear(z, None, None, part, replace(whole, rows=values.shape[0])))
    return torch.cat(products, -1)


@_op.register_fake
def _fake(x: Tensor, *rest: Tensor | Sequence[Tensor] | str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(str(rest[-1])).rows))
