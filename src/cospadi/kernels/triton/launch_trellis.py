"""Launching the Triton kernels for trellis codes. `cospadi.kernels.triton.launch` chooses among them."""

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.triton.launch_common import Config, parts, power_of_2
from cospadi.kernels.triton.trellis import add_parts_kernel, expand_kernel, few_tokens_kernel

MOST_TOKENS = 8
"""Tokens that the product takes: every token costs a multiplication for each value, and no tensor core helps."""
PROGRAMS = 512
"""About as many programs as fill a large device; narrow matrices are cut along their inputs to reach them."""
ROWS_ADDED = 256
EXPAND_ROWS, EXPAND_COLUMNS = 32, 128


def trellis_fits(spec: MatrixSpec) -> bool:
    """Whether the kernels read this spec: four values of a row follow each other in a tile, and windows fit 32 bits."""
    code = spec.trellis
    return code is not None and code.inputs % 4 == 0 and 3 * spec.bits + code.state <= 32


def trellis(x: Tensor, packed: Packed, spec: MatrixSpec, config: Config, out_dtype: torch.dtype) -> Tensor:
    """Trellis codes that satisfy :func:`trellis_fits`; 1 to MOST_TOKENS tokens. `config.width` is in tiles."""
    code, tokens = spec.trellis, x.shape[0]
    assert code is not None
    down, across = code.tiles(spec.rows, spec.columns)
    shares = min(parts(PROGRAMS, down), parts(across, config.width))
    each = parts(parts(across, shares), config.width) * config.width
    shares = parts(across, each)
    sums = torch.empty(shares, tokens, spec.rows, dtype=torch.float32, device=x.device)
    few_tokens_kernel[(down, shares)](
        x,
        packed["values"].contiguous(),
        sums,
        spec.rows,
        spec.columns,
        across,
        each,
        tokens,
        BITS=spec.bits,
        STATE=code.state,
        INPUTS=code.inputs,
        OUTPUTS=code.outputs,
        TOKENS=power_of_2(tokens),
        TILES=config.width,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    out = torch.empty(tokens, spec.rows, dtype=out_dtype, device=x.device)
    add_parts_kernel[(parts(spec.rows, ROWS_ADDED), tokens)](
        sums, packed["scales"], out, spec.rows, tokens, shares, ROWS=ROWS_ADDED, num_warps=4
    )
    return out


def expand_trellis(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """Unpack trellis codes that satisfy :func:`trellis_fits` to (rows, columns) in `dtype`."""
    code, values = spec.trellis, packed["values"].contiguous()
    assert code is not None
    out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=values.device)
    expand_kernel[(parts(spec.rows, EXPAND_ROWS), parts(spec.columns, EXPAND_COLUMNS))](
        values,
        packed["scales"],
        out,
        spec.rows,
        spec.columns,
        code.tiles(spec.rows, spec.columns)[1],
        BITS=spec.bits,
        STATE=code.state,
        INPUTS=code.inputs,
        OUTPUTS=code.outputs,
        ROWS=EXPAND_ROWS,
        COLUMNS=EXPAND_COLUMNS,
        num_warps=8,
    )
    return out
