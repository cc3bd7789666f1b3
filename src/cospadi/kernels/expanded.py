"""Dense forms that are kept while their stored tensors are unchanged: on a processor, where decoding them takes long.

A processor decodes a trellis value in several nanoseconds and multiplies one in a fraction of that, so a layer that
decoded its weight at every call would be ten to a hundred times slower than a dense one. Its weight is therefore
decoded at the first call and kept. Memory then is that of the dense layer beside the stored one; files stay small.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor, dtype

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels import _torch_private as hooks
from cospadi.kernels.decode import dense_rows


@dataclass(frozen=True)
class _Kept:
    """A dense form, and what must be unchanged for it to hold."""

    source: weakref.ref[Tensor]
    state: tuple[object, ...]
    dense: Tensor


_kept: dict[int, _Kept] = {}


def expanded(packed: Packed, spec: MatrixSpec, kind: dtype) -> Tensor:
    """The dense matrix (rows, columns) in `kind`, kept until the values go, or they or the scales change.

    Args:
        packed: stored tensors on the CPU; the identity of `values` is that of the matrix.
        spec: how they are stored.
        kind: dtype of the result, which callers must not change.
    """
    values, scales = packed["values"], packed["scales"]
    # inference tensors have no version, so that a change would not be noticed; trained scales change all the time
    if values.is_inference() or scales.is_inference() or scales.requires_grad:
        return dense_rows(packed, spec, kind)
    state = tuple((id(t), t.data_ptr(), hooks.tensor_version(t)) for t in (values, scales)), kind
    key = id(values)
    found = _kept.get(key)
    if found is not None and found.source() is values and found.state == state:
        return found.dense
    dense = dense_rows(packed, spec, kind)
    _kept[key] = _Kept(weakref.ref(values, lambda _: _kept.pop(key, None)), state, dense)
    return dense


def forget() -> None:
    """Free all dense forms; the next calls decode again."""
    _kept.clear()
