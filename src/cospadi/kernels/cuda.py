"""The operation on CUDA: decode kernels for few tokens, unpacking and cuBLAS for many.

`cospadi.kernels.autotune` chooses the kernel of each of the two products separately, per shape and number of tokens.
For one token, x D stays in float32 between them. The dense path, which unpacks the factors into scratch memory and
calls cuBLAS, serves specs without a kernel (3, 5, 6 and 14 bits, trellis codes, sparse with zero points or half steps),
those not in 16-bit floats, machines without Triton, and products whose kernels all fail to compile or to run.

In eager mode a decode step waits for the host. Everything that follows from the spec is therefore prepared at the first
call and looked up by one key later (`autotune.ways`).
"""

import logging
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from cospadi.format import MatrixSpec, Packed, unpack
from cospadi.kernels.autotune import Candidate, Run, Way, ways
from cospadi.kernels.cost import rebuild_pays

launch: ModuleType | None
no_triton = ""
"""Why Triton cannot be imported; empty if it can."""
try:
    from cospadi.kernels.triton import launch
except ImportError as _error:
    launch = None
    no_triton = str(_error)

logger = logging.getLogger(__name__)

SCRATCH_TOKENS = 4  # from here on small matrices may be faster unpacked, since the unpacked ones fit into the cache
MANY_TOKENS = 65  # from here on the number of tokens makes no difference: no decode kernel takes so many


def _kernels_run(dtype: torch.dtype) -> bool:
    """Whether there are kernels for layers of this dtype; warns once if Triton is missing."""
    if launch is None:
        _warn_of_missing_triton(no_triton)
        return False
    return dtype in (torch.bfloat16, torch.float16)


@cache
def _warn_of_missing_triton(reason: str) -> None:
    logger.warning(
        "Triton cannot be imported (%s): compressed layers unpack their weights at every call, which is slow; "
        "install triton",
        reason,
    )


def cuda_forward(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed,
    codes_spec: MatrixSpec,
) -> Tensor:
    """``(x D) S`` for x (tokens, d_in) on a CUDA device; returns (tokens, rows) in the dtype of x."""
    if x.shape[0] == 0:
        return x.new_empty(0, codes_spec.rows)
    device, dtype = x.device, x.dtype
    here = device.index is None or device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(device):  # Triton launches on the current device
        hidden = x.contiguous()
        if dictionary is not None and dictionary_spec is not None:
            if rebuild_pays(x.shape[0], dictionary_spec, codes_spec):
                return linear(x, scratch(codes, codes_spec, dtype) @ scratch(dictionary, dictionary_spec, dtype))
            hidden = packed_linear(hidden, dictionary, dictionary_spec, dtype, codes_spec)
        return packed_linear(hidden, codes, codes_spec, dtype)


def scratch(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """The dense form (rows, columns) of a stored matrix in `dtype`; a dense 16-bit matrix is returned as it is."""
    values = packed["values"]
    if not spec.sparse and spec.bits == 16:
        return values.to(dtype)
    key = (values.device.index, dtype, spec, "unpacked")
    way = ways.get(key)
    if way is None:
        way = ways[key] = prepared_unpacking(key, spec, dtype)
    return way(packed)


def prepared_unpacking(key: Hashable, spec: MatrixSpec, dtype: torch.dtype) -> Run:
    """The function that :func:`scratch` calls for this key, from the stored tensors to the dense matrix."""

    def by_torch(packed: Packed) -> Tensor:
        return unpack(packed, spec, dtype)

    if not _kernels_run(dtype) or launch is None or not launch.readable(spec):
        return by_torch
    kernel = launch.unpacked
    return Way(key, [Candidate("unpacking kernel", lambda packed: kernel(packed, spec, dtype))], by_torch)


def packed_linear(
    x: Tensor, packed: Packed, spec: MatrixSpec, dtype: torch.dtype, codes: MatrixSpec | None = None
) -> Tensor:
    """``x Mᵀ`` for a stored matrix M.

    Args:
        x: (tokens, columns), contiguous, in `dtype`; or the result of this function for these codes.
        packed: stored tensors of M.
        spec: how M is stored.
        dtype: of the layer.
        codes: the matrix that will read the result, if any. For one token the result may then be in float32, and laid
            out as the kernel of the codes reads it.

    Returns:
        (tokens, rows) in `dtype`, unless `codes` says otherwise.
    """
    tokens = x.shape[0]
    key = (x.device.index, dtype, spec, codes, min(tokens, MANY_TOKENS))
    way = ways.get(key)
    if way is None:
        way = ways[key] = prepared_product(x.device.index, spec, tokens, dtype, codes)
    return way(x, packed)


def prepared_product(
    device: int | None, spec: MatrixSpec, tokens: int, dtype: torch.dtype, codes: MatrixSpec | None
) -> Run:
    """The function (x, packed) → y that :func:`packed_linear` calls: all that can be prepared without the tensors."""

    def by_scratch(x: Tensor, packed: Packed) -> Tensor:
        plain_x = x if x.dim() == 2 else x[:, :, :32].reshape(1, -1)
        return linear(plain_x.to(dtype), scratch(packed, spec, dtype))

    if not _kernels_run(dtype) or launch is None or not launch.readable(spec) or tokens > launch.MOST_TOKENS:
        return by_scratch
    plain = not spec.sparse and spec.bits == 16
    if plain and tokens > 1:
        return by_scratch
    made, more = launch.handed_on(spec, tokens, codes, dtype)

    def by(kernel: Callable[..., Tensor], config: Any) -> Candidate:
        return Candidate(f"{kernel.__name__} {config}", lambda x, packed: kernel(x, packed, spec, config, made, **more))

    candidates = [by(kernel, config) for kernel, config in launch.options(spec, tokens)]
    if tokens >= SCRATCH_TOKENS or (tokens > 1 and not spec.sparse):
        candidates.append(Candidate("scratch", by_scratch))
    bucket = tokens if tokens <= 4 else 1 << (tokens - 1).bit_length()
    return Way((device, dtype, spec, bucket), candidates, by_scratch)
