"""Launching the Triton kernels: which spec fits which kernel, and views of the stored tensors as the kernels read them.

Importing this module needs Triton. Every function takes x (tokens, columns), contiguous, and returns (tokens, rows).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels import triton_balanced, triton_kernels
from cospadi.solvers.projection import parse_pattern

MOST_TOKENS = 64  # of the decode kernels
_FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Config:
    """Launch parameters: rows and width of a tile (words, or stored elements), lanes to a word, warps, stages."""

    rows: int
    width: int
    warps: int
    lanes: int = 32
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.width} lanes {self.lanes} warps {self.warps} stages {self.stages}"


# What is worth trying, the likely best first (measured on an H200); about three each, since the first call of a shape
# compiles and times them all.
BALANCED = (Config(8, 4, 1), Config(4, 8, 1), Config(16, 8, 4), Config(4, 32, 4))
SPARSE_ONE = (Config(8, 4, 1, 8), Config(8, 8, 2, 8), Config(8, 1, 2, 8))
SPARSE_MANY = (Config(64, 4, 4, 8), Config(16, 4, 1, 8), Config(32, 4, 2, 8))
DENSE_ONE = (Config(4, 1024, 4), Config(4, 2048, 4))
DENSE_ONE_PACKED = (Config(4, 512, 4), Config(4, 256, 4))  # elements are 32-bit words
DENSE_MANY = (Config(32, 128, 4, stages=4), Config(16, 256, 2, stages=4), Config(16, 128, 2, stages=5))
DENSE_MANY_PACKED = (Config(32, 64, 4), Config(16, 32, 2, stages=4))
EXPAND = Config(2, 16, 1)


def pitch(tokens: int) -> int:
    """Columns of z from mask word to mask word in the balanced kernel.

    The j-th set bits of two words lie at about the same place, so with 32 the threads of a warp would meet in the same
    banks of the first-level cache: 5.8 rounds a load for one token, 2.2 with 36 (simulated with random masks; the
    kernel gains little from it on an H200, where integer arithmetic limits it first).
    """
    return 36 if tokens <= 2 else 34 if tokens <= 4 else 33


def options(spec: MatrixSpec, tokens: int) -> list[tuple[Callable[..., Tensor], Config]]:
    """Kernels and launch parameters that compute ``x Mᵀ`` for this spec and number of tokens, the likely best first."""
    if not spec.sparse:
        if spec.bits == 16 or (spec.bits == 8 and spec.symmetric):
            return [(dense, config) for config in (DENSE_ONE if tokens == 1 else DENSE_MANY)]
        return [(dense, config) for config in (DENSE_ONE_PACKED if tokens == 1 else DENSE_MANY_PACKED)]
    found: list[tuple[Callable[..., Tensor], Config]] = []
    if tokens <= 16 and balanced_fits(spec):
        found += [(balanced, config) for config in BALANCED]
    if not found:
        found += [(sparse, config) for config in (SPARSE_ONE if tokens == 1 else SPARSE_MANY)]
    return found


def per_word(spec: MatrixSpec) -> int:
    """Values of a full mask word; 0 where it varies (pattern ``"free"``)."""
    balanced = parse_pattern(spec.pattern)
    return 0 if balanced is None else balanced[0] * 32 // balanced[1]


def readable(spec: MatrixSpec) -> bool:
    """Whether a kernel reads the stored values themselves (16, 8, 4, 2 bits; zero points only where dense)."""
    return spec.bits in (16, 8, 4, 2) and (spec.symmetric or not spec.sparse)


def unit(spec: MatrixSpec) -> int:
    """Bits that the balanced kernel loads as one: 64 or 32, where a mask word's values fill whole ones; else 0."""
    return next((size for size in (64, 32) if per_word(spec) * spec.bits % size == 0), 0)


def balanced_fits(spec: MatrixSpec) -> bool:
    """Whether `balanced` reads this: full mask words, whose values begin at whole units, as do the scales' groups."""
    if not spec.sparse or not readable(spec) or spec.columns % 32 or per_word(spec) == 0:
        return False
    return unit(spec) > 0 and spec.group % (unit(spec) // spec.bits) == 0


def _padded(tokens: int) -> int:
    """Tokens of a tile: 1, or at least 16 for the tensor cores."""
    return 1 if tokens == 1 else max(16, triton.next_power_of_2(tokens))


def _elements(packed: Packed, spec: MatrixSpec) -> Tensor:
    """Values as the element kernels read them: floats, signed bytes, or bytes that hold several or unsigned ones."""
    values = packed["values"].contiguous()
    return values.view(torch.uint8) if values.dtype == torch.int32 else values


def _common(packed: Packed, spec: MatrixSpec) -> dict[str, Any]:
    return {"BITS": spec.bits, "SCALED": spec.integer, "GROUP": 0 if spec.groups == 1 else spec.group}


def pitched(x: Tensor) -> Tensor:
    """Give x (tokens, columns) as the balanced kernel reads it: (planes, mask words, pitch, tokens of a plane).

    In float32 for one token, else in the dtype of x; tokens up to a power of two, at most 8 in a plane.
    """
    tokens, columns = x.shape
    padded = triton.next_power_of_2(tokens)
    each = min(padded, 8)
    shape = (padded // each, columns // 32, pitch(each), each)
    if tokens == 1:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if tokens < padded:
        x = torch.nn.functional.pad(x, (0, 0, 0, padded - tokens))
    out[:, :, :32] = x.view(padded // each, each, -1, 32).permute(0, 2, 3, 1)
    return out


def balanced(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Sparse rows that satisfy :func:`balanced_fits`; a few tokens, or one as :func:`pitched` gives it."""
    z = x if x.dim() == 4 else pitched(x)
    tokens = 1 if x.dim() == 4 else x.shape[0]
    out = torch.empty(tokens, spec.rows, dtype=out_dtype, device=x.device)
    values = packed["values"].contiguous()
    if values.data_ptr() % 16:
        values = values.clone()
    triton_balanced.balanced_linear_kernel[(triton.cdiv(spec.rows, config.rows),)](
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
        FLOAT=_FLOATS.get(values.dtype, tl.float32),
        PER_WORD=per_word(spec),
        TOKENS=z.shape[3],
        PLANES=z.shape[0],
        PITCH=z.shape[2],
        ROWS=config.rows,
        WORDS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
        **_common(packed, spec),
    )
    return out


def sparse(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Sparse rows of any pattern; 1 to MOST_TOKENS tokens, x also in float32 where there is one."""
    out = torch.empty(x.shape[0], spec.rows, dtype=out_dtype, device=x.device)
    values, mask = _elements(packed, spec), packed["mask"].contiguous()
    triton_kernels.sparse_linear_kernel[(triton.cdiv(spec.rows, config.rows),)](
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
        TOKENS=_padded(x.shape[0]),
        ROWS=config.rows,
        WORDS=config.width,
        LANES=config.lanes,
        num_warps=config.warps,
        num_stages=config.stages,
        **_common(packed, spec),
    )
    return out


def dense(
    x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype, spaced: bool = False
) -> Tensor:
    """Dense rows of 16, 8, 4 or 2 bits; 1 to MOST_TOKENS tokens.

    With `spaced`, for one token and rows in whole runs of 32, the result is as :func:`pitched` gives it.
    """
    tokens = x.shape[0]
    if spaced:
        out = torch.empty(1, spec.rows // 32, pitch(1), 1, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty(tokens, spec.rows, dtype=out_dtype, device=x.device)
    values = packed["values"].contiguous()
    zeros = x if spec.symmetric else packed["zeros"].contiguous()
    triton_kernels.dense_linear_kernel[(triton.cdiv(spec.rows, config.rows),)](
        x,
        values,
        packed.get("scales", x),
        zeros,
        out,
        spec.rows,
        spec.columns,
        values.stride(0),
        spec.groups,
        zeros.stride(0),
        tokens,
        PER=32 // spec.bits if values.dtype == torch.int32 else 1,
        SYMMETRIC=spec.symmetric,
        TOKENS=_padded(tokens),
        PITCH=pitch(1) if spaced else 32,
        ROWS=config.rows,
        COLUMNS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
        **_common(packed, spec),
    )
    return out


def expand(packed: Packed, spec: MatrixSpec, dtype: torch.dtype, config: Config) -> Tensor:
    """A sparse matrix made dense, (rows, columns) `dtype`."""
    values, mask = _elements(packed, spec), packed["mask"].contiguous()
    out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=mask.device)
    triton_kernels.expand_kernel[(triton.cdiv(spec.rows, config.rows),)](
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
        **_common(packed, spec),
    )
    return out
