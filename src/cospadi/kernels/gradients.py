"""Gradients of the operation with respect to x, 16-bit values and scales. Plain torch, on any device."""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from cospadi.format import MatrixSpec, Packed
from cospadi.format.pack import decode_values
from cospadi.kernels.decode import dense_rows, mask_of


def backward(
    gradient: Tensor,
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed,
    codes_spec: MatrixSpec,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of ``y = (x D) S``.

    Args:
        gradient: with respect to y, (tokens, rows).
        x: (tokens, d_in).
        dictionary: stored tensors of Dᵀ, or None.
        dictionary_spec: how Dᵀ is stored.
        codes: stored tensors of Sᵀ.
        codes_spec: how Sᵀ is stored.
        needs: which gradients to compute: ``"x"``, ``"dictionary_values"``, ``"dictionary_scales"``,
            ``"codes_values"``, ``"codes_scales"``.

    Returns:
        The gradients in `needs`, by the same names.
    """
    out: dict[str, Tensor] = {}
    atoms = None if dictionary is None else dense_rows(dictionary, _known(dictionary_spec), x.dtype)
    for_codes = {"codes_values", "codes_scales"} & needs
    if for_codes:
        hidden = x if atoms is None else linear(x, atoms)
        out |= stored_gradients(gradient.T @ hidden, codes, codes_spec, "codes_", for_codes)
    if needs == for_codes:
        return out
    of_hidden = gradient @ dense_rows(codes, codes_spec, x.dtype)
    if atoms is None or dictionary is None:
        return out | {"x": of_hidden}
    if "x" in needs:
        out["x"] = of_hidden @ atoms
    for_dictionary = {"dictionary_values", "dictionary_scales"} & needs
    if for_dictionary:
        of_atoms = of_hidden.T @ x
        out |= stored_gradients(of_atoms, dictionary, _known(dictionary_spec), "dictionary_", for_dictionary)
    return out


def _known(spec: MatrixSpec | None) -> MatrixSpec:
    if spec is None:
        raise ValueError("a dictionary needs its spec")
    return spec


def stored_gradients(
    gradient: Tensor, packed: Packed, spec: MatrixSpec, prefix: str, needs: frozenset[str] | set[str]
) -> dict[str, Tensor]:
    """Gradients of the stored values and scales of a matrix, from that of the dense matrix.

    A stored integer matrix is ``(level − zero) · scale``: the gradient of a scale is the sum, over its values, of the
    gradient times the level. The levels themselves have no gradient.

    Args:
        gradient: (rows, columns), with respect to the dense matrix.
        packed: its stored tensors.
        spec: how it is stored.
        prefix: of the names in `needs` and in the result.
        needs: ``prefix + "values"`` (16-bit specs) and ``prefix + "scales"`` (integer specs).

    Returns:
        The gradients in `needs`, by name.
    """
    picked = gradient[mask_of(packed, spec)].view(spec.rows, spec.nonzeros) if spec.sparse else gradient
    out: dict[str, Tensor] = {}
    if prefix + "values" in needs:
        out[prefix + "values"] = picked.to(packed["values"].dtype)
    if prefix + "scales" in needs:
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        levels = decode_values(packed | {"scales": torch.ones_like(packed["scales"])}, spec, wide)
        size = spec.group or spec.nonzeros
        products = pad(picked.to(wide) * levels, (0, spec.groups * size - spec.nonzeros))
        out[prefix + "scales"] = products.view(spec.rows, -1, size).sum(-1).to(packed["scales"].dtype)
    return out
