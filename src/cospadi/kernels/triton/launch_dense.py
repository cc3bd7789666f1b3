"""Launching the Triton kernels for dense rows. `cospadi.kernels.triton.launch` chooses among them."""

from functools import lru_cache

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.triton.general import dense_linear_kernel
from cospadi.kernels.triton.integers import expand_integers_kernel, few_tokens_kernel, one_token_kernel
from cospadi.kernels.triton.launch_common import FLOATS, Config, aligned, common, elements, output, padded, parts, pitch


def one_token_fits(spec: MatrixSpec) -> bool:
    """Whether `one_token` reads this spec: dense integers whose rows and groups are whole chunks of 16 bytes."""
    chunk = 128 // spec.bits
    return not spec.sparse and spec.bits in (8, 4, 2) and spec.columns % chunk == 0 and spec.group % chunk == 0


@lru_cache(maxsize=4096)
def span(spec: MatrixSpec) -> int:
    """Columns that `few_tokens` multiplies before it applies a scale; 0 if it does not read this spec."""
    if spec.sparse or spec.bits not in (8, 4, 2):
        return 0
    size = min(64, spec.group & -spec.group) if spec.groups > 1 else 64
    return size if size >= 16 else 0


def half_steps(spec: MatrixSpec) -> int:
    """The kernels' constant HALF: 0 whole zero points, 1 half steps, 2 always the middle of the levels."""
    return (2 if spec.symmetric else 1) if spec.half else 0


def _zeros(packed: Packed) -> Tensor:
    """Stored zero points; without any, a tensor that the kernels take but do not read."""
    return packed.get("zeros", packed["scales"]).contiguous()


def dense(
    x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype, spaced: bool = False
) -> Tensor:
    """Dense rows of 16, 8, 4 or 2 bits; 1 to MOST_TOKENS tokens.

    With `spaced`, for one token and rows in whole runs of 32, the result has the layout of `launch_sparse.pitched`.
    """
    tokens = x.shape[0]
    out = output(x, spec, out_dtype, spaced)
    values = packed["values"].contiguous()
    zeros = packed["zeros"].contiguous() if "zeros" in packed else x
    dense_linear_kernel[(parts(spec.rows, config.rows),)](
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
        CENTRED=spec.centred,
        HALF=half_steps(spec),
        TOKENS=padded(tokens),
        PITCH=pitch(1) if spaced else 32,
        ROWS=config.rows,
        COLUMNS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
        **common(spec),
    )
    return out


def one_token(
    x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype, spaced: bool = False
) -> Tensor:
    """Dense integers that satisfy :func:`one_token_fits`; one token of 16-bit floats; `spaced` as for `dense`."""
    out = output(x, spec, out_dtype, spaced)
    zeros = _zeros(packed)
    one_token_kernel[(parts(spec.rows, config.rows),)](
        aligned(x).view(-1).view(torch.int64),
        aligned(packed["values"]).view(-1).view(torch.int32),
        packed["scales"],
        zeros,
        out,
        spec.rows,
        spec.columns,
        spec.groups,
        zeros.stride(0),
        BITS=spec.bits,
        FLOAT=FLOATS[x.dtype],
        GROUP=0 if spec.groups == 1 else spec.group,
        CENTRED=spec.centred,
        HALF=half_steps(spec),
        PITCH=pitch(1) if spaced else 32,
        ROWS=config.rows,
        CHUNKS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def few_tokens(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Dense integers for which :func:`span` is not 0; 2 to MOST_TOKENS tokens."""
    out = torch.empty(x.shape[0], spec.rows, dtype=out_dtype, device=x.device)
    values, zeros = elements(packed, spec), _zeros(packed)
    few_tokens_kernel[(parts(spec.rows, config.rows),)](
        x,
        values,
        packed["scales"],
        zeros,
        out,
        spec.rows,
        spec.columns,
        values.stride(0),
        spec.groups,
        zeros.stride(0),
        x.shape[0],
        BITS=spec.bits,
        GROUP=0 if spec.groups == 1 else spec.group,
        CENTRED=spec.centred,
        HALF=half_steps(spec),
        SIGNED=values.dtype == torch.int8,
        TOKENS=max(16, padded(x.shape[0])),
        ROWS=config.rows,
        SPAN=span(spec),
        SPANS=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def expand_integers(packed: Packed, spec: MatrixSpec, dtype: torch.dtype, config: Config) -> Tensor:
    """Unpack dense integers to (rows, columns) in `dtype`."""
    values, zeros = packed["values"].contiguous(), _zeros(packed)
    out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=values.device)
    per = 32 // spec.bits if values.dtype == torch.int32 else 1
    run = min(8, per) if per > 1 else 8
    if spec.groups > 1 and spec.group % run:
        run = 1
    runs = config.width // run
    expand_integers_kernel[(parts(spec.rows, config.rows), parts(parts(spec.columns, run), runs))](
        values,
        packed["scales"],
        zeros,
        out,
        spec.rows,
        spec.columns,
        values.stride(0),
        spec.groups,
        zeros.stride(0),
        BITS=spec.bits,
        GROUP=0 if spec.groups == 1 else spec.group,
        CENTRED=spec.centred,
        HALF=half_steps(spec),
        PER=per,
        RUN=run,
        ROWS=config.rows,
        RUNS=runs,
        num_warps=config.warps,
    )
    return out
