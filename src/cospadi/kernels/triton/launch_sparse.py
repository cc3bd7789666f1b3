"""Launching the Triton kernels for sparse rows. `cospadi.kernels.triton.launch` chooses among them.

Every function takes x (tokens, columns), contiguous, and returns (tokens, rows).
"""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.triton.balanced import balanced_linear_kernel
from cospadi.kernels.triton.general import expand_kernel, sparse_linear_kernel
from cospadi.kernels.triton.launch_common import (
    FLOATS,
    Config,
    aligned,
    common,
    elements,
    padded,
    parts,
    per_word,
    pitch,
    power_of_2,
    readable,
)
from cospadi.kernels.triton.walk import walk_linear_kernel


@lru_cache(maxsize=4096)
def unit(spec: MatrixSpec) -> int:
    """Bits that the balanced kernel loads at once: 64 or 32, if the values of a mask word fill whole units; else 0."""
    return next((size for size in (64, 32) if per_word(spec) * spec.bits % size == 0), 0)


def balanced_fits(spec: MatrixSpec) -> bool:
    """Whether `balanced` reads this spec: full mask words whose values, and groups of scales, begin at whole units."""
    if not spec.sparse or not readable(spec) or spec.columns % 32 or per_word(spec) == 0:
        return False
    return unit(spec) > 0 and spec.group % (unit(spec) // spec.bits) == 0


def pitched(x: Tensor) -> Tensor:
    """Lay x (tokens, columns) out as the balanced kernel reads it: (planes, mask words, pitch, tokens of a plane).

    In float32 for one token, otherwise in the dtype of x. The number of tokens is rounded up to a power of two; a plane
    holds at most 8.
    """
    tokens, columns = x.shape
    rounded = power_of_2(tokens)
    each = min(rounded, 8)
    shape = (rounded // each, columns // 32, pitch(each), each)
    if tokens == 1:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if tokens < rounded:
        x = torch.nn.functional.pad(x, (0, 0, 0, rounded - tokens))
    out[:, :, :32] = x.view(rounded // each, each, -1, 32).permute(0, 2, 3, 1)
    return out


def balanced(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Sparse rows that satisfy :func:`balanced_fits`; a few tokens, or one as :func:`pitched` lays it out."""
    z = x if x.dim() == 4 else pitched(x)
    tokens = 1 if x.dim() == 4 else x.shape[0]
    out = torch.empty(tokens, spec.rows, dtype=out_dtype, device=x.device)
    values = aligned(packed["values"])
    balanced_linear_kernel[(parts(spec.rows, config.rows),)](
        z,
        values.view(spec.rows, -1).view(torch.int64 if unit(spec) == 64 else torch.int32),
        packed["mask"].contiguous(),
        packed.get("scales", out),
        out,
        spec.rows,
        spec.columns // 32,
        spec.groups,
        tokens,
        z.shape[1] * z.shape[2],
        UNIT=unit(spec),
        FLOAT=FLOATS.get(values.dtype, tl.float32),
        PER_WORD=per_word(spec),
        TOKENS=z.shape[3],
        PLANES=z.shape[0],
        PITCH=z.shape[2],
        ROWS=config.rows,
        WORDS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
        **common(spec),
    )
    return out


def walk(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Sparse rows that satisfy :func:`balanced_fits`; one token, also as :func:`pitched` lays it out."""
    z = x if x.dim() == 4 else pitched(x)
    out = torch.empty(1, spec.rows, dtype=out_dtype, device=x.device)
    values = aligned(packed["values"])
    walk_linear_kernel[(parts(spec.rows, config.rows),)](
        z,
        values.view(spec.rows, -1).view(torch.int32),
        packed["mask"].contiguous(),
        packed.get("scales", out),
        out,
        spec.rows,
        spec.columns // 32,
        spec.groups,
        FLOAT=FLOATS.get(values.dtype, tl.float32),
        PER_WORD=per_word(spec),
        PITCH=z.shape[2],
        ROWS=config.rows,
        WORDS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
        **common(spec),
    )
    return out


def sparse(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Sparse rows of any pattern; 1 to MOST_TOKENS tokens; a single one may be in float32."""
    out = torch.empty(x.shape[0], spec.rows, dtype=out_dtype, device=x.device)
    values, mask = elements(packed, spec), packed["mask"].contiguous()
    sparse_linear_kernel[(parts(spec.rows, config.rows),)](
        x,
        values,
        mask,
        packed.get("scales", x),
        out,
        spec.rows,
        spec.columns,
        values.stride(0),
        mask.shape[1],
        spec.groups,
        x.shape[0],
        PER_WORD=per_word(spec),
        TOKENS=padded(x.shape[0]),
        ROWS=config.rows,
        WORDS=config.width,
        LANES=config.lanes,
        num_warps=config.warps,
        num_stages=config.stages,
        **common(spec),
    )
    return out


def expand(packed: Packed, spec: MatrixSpec, dtype: torch.dtype, config: Config) -> Tensor:
    """Unpack sparse rows to (rows, columns) in `dtype`."""
    values, mask = elements(packed, spec), packed["mask"].contiguous()
    out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=mask.device)
    expand_kernel[(parts(spec.rows, config.rows),)](
        values,
        mask,
        packed.get("scales", out),
        out,
        spec.rows,
        spec.columns,
        values.stride(0),
        mask.shape[1],
        spec.groups,
        PER_WORD=per_word(spec),
        ROWS=config.rows,
        WORDS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
        **common(spec),
    )
    return out
