"""The operation on CUDA: decode kernels for a few tokens, dense scratch and cuBLAS for many.

The two products are chosen apart, each per shape and number of tokens, by `cospadi.kernels.tuning`. For one token x D
stays in float32 between them. Specs without a kernel (3 and 14 bits, sparse with zero points), layers in other dtypes
than 16-bit floats, and machines without Triton take the dense path: factors unpacked into a scratch, then cuBLAS. So do
products whose kernels all fail to compile or to run.
"""

import logging
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from cospadi.format import MatrixSpec, Packed, unpack
from cospadi.kernels.cost import rebuild_pays
from cospadi.kernels.tuning import Candidate, choose

launch: ModuleType | None
try:
    from cospadi.kernels import launch
except ImportError as _error:
    launch = None
    _reason = str(_error)

logger = logging.getLogger(__name__)
_said = False

SCRATCH_TOKENS = 4  # from here on, small matrices may be faster unpacked, which the cache then holds


def _kernels_run(dtype: torch.dtype) -> bool:
    """Whether there are kernels for layers of this dtype; says once if Triton is missing."""
    global _said
    if launch is None:
        if not _said:
            _said = True
            logger.warning(
                "Triton cannot be imported (%s): compressed layers unpack their weights at every call, which is slow; "
                "install triton",
                _reason,
            )
        return False
    return dtype in (torch.bfloat16, torch.float16)


def cuda_forward(
    x: Tensor,
    dictionary: Packed | None,
    dictionary_spec: MatrixSpec | None,
    codes: Packed,
    codes_spec: MatrixSpec,
) -> Tensor:
    """``(x D) S`` for x (tokens, d_in) on a CUDA device; returns (tokens, rows) in the dtype of x."""
    tokens, dtype = x.shape[0], x.dtype
    if tokens == 0:
        return x.new_empty(0, codes_spec.rows)
    with torch.cuda.device(x.device):
        hidden = x.contiguous()
        if dictionary is not None and dictionary_spec is not None:
            if rebuild_pays(tokens, dictionary_spec, codes_spec):
                return linear(x, scratch(codes, codes_spec, dtype) @ scratch(dictionary, dictionary_spec, dtype))
            hidden = packed_linear(hidden, dictionary, dictionary_spec, dtype, codes_spec)
        return packed_linear(hidden, codes, codes_spec, dtype)


def scratch(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """A stored matrix made dense, (rows, columns) `dtype`; 16-bit dense ones as they are."""
    if not spec.sparse and spec.bits == 16:
        return packed["values"].to(dtype)
    by_torch = partial(unpack, packed, spec, dtype)
    if not _kernels_run(dtype) or launch is None or not launch.readable(spec):
        return by_torch()
    by_kernel = Candidate("unpacking kernel", partial(launch.unpacked, packed, spec, dtype))
    return choose((packed["values"].device.index, dtype, spec, "unpacked"), [by_kernel], by_torch)


def packed_linear(
    x: Tensor, packed: Packed, spec: MatrixSpec, dtype: torch.dtype, codes: MatrixSpec | None = None
) -> Tensor:
    """``x Mᵀ`` for a stored matrix M.

    Args:
        x: (tokens, columns), contiguous, in `dtype`; or what this function gave for these codes.
        packed: stored tensors of M.
        spec: how M is stored.
        dtype: of the layer.
        codes: the matrix that will read the result: for one token that may be in float32 then, and spaced as its
            kernel likes it.

    Returns:
        (tokens, rows) in `dtype`, or as said.
    """

    def by_scratch() -> Tensor:
        plain_x = x if x.dim() == 2 else x[:, :, :32].reshape(1, -1)
        return linear(plain_x.to(dtype), scratch(packed, spec, dtype))

    tokens = x.shape[0]
    if not _kernels_run(dtype) or launch is None or not launch.readable(spec) or tokens > launch.MOST_TOKENS:
        return by_scratch()
    plain = not spec.sparse and spec.bits == 16
    if plain and tokens > 1:
        return by_scratch()
    made, more = launch.handed_on(spec, tokens, codes, dtype)
    candidates = [
        Candidate(f"{kernel.__name__} {config}", partial(kernel, x, packed, spec, config, made, **more))
        for kernel, config in launch.options(spec, tokens)
    ]
    if tokens >= SCRATCH_TOKENS or (tokens > 1 and not spec.sparse):
        candidates.append(Candidate("scratch", by_scratch))
    bucket = tokens if tokens <= 4 else 1 << (tokens - 1).bit_length()
    return choose((x.device.index, dtype, spec, bucket), candidates, by_scratch)
