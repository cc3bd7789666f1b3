"""The operation on CPU, and on any device without kernels of its own.

A stored matrix is unpacked and multiplied one block of rows at a time, so the scratch memory stays small whatever the
size of the layer. `cospadi.kernels.cost` decides the order of the two products.
"""

from torch import Tensor
from torch.nn.functional import linear

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.cost import rebuild_pays
from cospadi.kernels.decode import as_levels, block, dense_rows
from cospadi.kernels.expanded import expanded

# Numbers in a block: about 1 MB in bfloat16, which fits into the L2 cache and is enough work per torch call.
BLOCK_ELEMENTS = 1 << 19
# With many tokens the products dominate, and they are faster on larger blocks.
BLOCK_ELEMENTS_MANY = 1 << 21
MANY_TOKENS = 32


def block_rows(tokens: int, columns: int, whole: int = 1) -> int:
    """Rows per block of a matrix with `columns` columns that multiplies `tokens` tokens, a multiple of `whole`."""
    elements = BLOCK_ELEMENTS_MANY if tokens >= MANY_TOKENS else BLOCK_ELEMENTS
    return max(1, elements // columns // whole) * whole


def _whole(spec: MatrixSpec) -> int:
    """Rows that can only be read together."""
    return 1 if spec.trellis is None else spec.trellis.outputs


def packed_linear(x: Tensor, packed: Packed, spec: MatrixSpec) -> Tensor:
    """``x Mᵀ`` for a stored matrix M.

    Args:
        x: (tokens, columns).
        packed: stored tensors of M.
        spec: how M is stored.

    Returns:
        (tokens, rows) in the dtype of x.
    """
    levels = as_levels(packed, spec)
    if levels is not None:
        return packed_linear(x, *levels).mul_(packed["scales"].view(-1).to(x.dtype))
    if not spec.sparse and spec.bits == 16:
        return linear(x, packed["values"].to(x.dtype))
    if spec.trellis is not None and packed["values"].device.type == "cpu":
        return linear(x, expanded(packed, spec, x.dtype))
    step = block_rows(x.shape[0], spec.columns, _whole(spec))
    if step >= spec.rows:
        return linear(x, dense_rows(packed, spec, x.dtype))
    out = x.new_empty(x.shape[0], spec.rows)
    for start in range(0, spec.rows, step):
        rows, part = block(packed, spec, start, start + step)
        out[:, start : start + step] = linear(x, dense_rows(rows, part, x.dtype))
    return out


def rebuilt_linear(
    x: Tensor, dictionary: Packed, dictionary_spec: MatrixSpec, codes: Packed, codes_spec: MatrixSpec
) -> Tensor:
    """``x (D S)``, with W rebuilt one block of outputs at a time. Arguments as in :func:`cpu_forward`."""
    atoms = dense_rows(dictionary, dictionary_spec, x.dtype)
    step = block_rows(x.shape[0], dictionary_spec.columns, _whole(codes_spec))
    out = x.new_empty(x.shape[0], codes_spec.rows)
    for start in range(0, codes_spec.rows, step):
        rows, part = block(codes, codes_spec, start, start + step)
        out[:, start : start + step] = linear(x, dense_rows(rows, part, x.dtype) @ atoms)
    return out


def cpu_forward(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed,
    codes_spec: MatrixSpec,
) -> Tensor:
    """``(x D) S`` for x (tokens, d_in); returns (tokens, rows) in the dtype of x."""
    if dictionary is None or dictionary_spec is None:
        return packed_linear(x, codes, codes_spec)
    if rebuild_pays(x.shape[0], dictionary_spec, codes_spec):
        return rebuilt_linear(x, dictionary, dictionary_spec, codes, codes_spec)
    return packed_linear(packed_linear(x, dictionary, dictionary_spec), codes, codes_spec)
