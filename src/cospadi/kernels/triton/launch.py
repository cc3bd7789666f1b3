"""Launching the Triton kernels: which spec fits which kernel, and views of the stored tensors as the kernels read them.

Importing this module needs Triton. Every function takes x (tokens, columns), contiguous, and returns (tokens, rows).
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.triton import balanced as triton_balanced
from cospadi.kernels.triton import general as triton_kernels
from cospadi.kernels.triton import walk as triton_walk
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
from cospadi.kernels.triton.launch_dense import dense, expand_integers, few_tokens, one_token, one_token_fits, span

__all__ = [  # and what the modules beneath have
    "Config", "balanced", "balanced_fits", "dense", "expand", "expand_integers", "few_tokens", "handed_on", "one_token",
    "one_token_fits", "options", "per_word", "pitch", "pitched", "readable", "span", "sparse", "unit", "unpacked",
    "walk",
]  # fmt: skip

MOST_TOKENS = 64  # of the decode kernels

# What is worth trying, the likely best first (measured on an H100 and an H200 on shapes of an 8B model); at most five a
# product, since the first call of a shape compiles and times them all. Small matrices need many words to a row to fill
# the device, large ones want few.
BALANCED = (Config(8, 4, 1), Config(4, 8, 1), Config(4, 32, 4))
BALANCED_ONE = (Config(4, 8, 1), Config(4, 32, 4))
WALK = (Config(8, 4, 1), Config(4, 8, 1), Config(4, 32, 4))
SPARSE_ONE = (Config(8, 4, 1, 8), Config(8, 8, 2, 8), Config(8, 1, 2, 8))
SPARSE_MANY = (Config(64, 4, 4, 8), Config(16, 4, 1, 8))
DENSE_ONE = (Config(4, 1024, 4), Config(2, 1024, 2))
DENSE_ONE_PACKED = (Config(4, 256, 4), Config(4, 512, 4))  # elements are 32-bit words
DENSE_MANY = (Config(16, 256, 2, stages=4), Config(32, 128, 4, stages=4))
DENSE_MANY_PACKED = (Config(32, 64, 4), Config(16, 32, 2, stages=4))
ONE_TOKEN = (Config(8, 32, 4), Config(4, 64, 4), Config(8, 64, 4))  # width in chunks of 16 bytes
FEW_TOKENS = (Config(32, 4, 4, stages=3), Config(16, 4, 4, stages=3), Config(16, 8, 8, stages=2))  # width in spans
EXPAND = Config(2, 16, 1)
EXPAND_INTEGERS = Config(2, 1024, 4)  # width in columns


Option = tuple[Callable[..., Tensor], Config]


def options(spec: MatrixSpec, tokens: int) -> list[Option]:
    """Kernels and launch parameters that compute ``x Mᵀ`` for this spec and number of tokens, the likely best first."""
    if not spec.sparse:
        bytes_ = spec.bits == 16 or (spec.bits == 8 and spec.symmetric)
        if tokens == 1:
            chosen: list[Option] = [(one_token, config) for config in ONE_TOKEN] if one_token_fits(spec) else []
            rest = DENSE_ONE if bytes_ else DENSE_ONE_PACKED
        else:
            chosen = [(few_tokens, config) for config in FEW_TOKENS] if span(spec) else []
            rest = DENSE_MANY if bytes_ else DENSE_MANY_PACKED
        return [*chosen, *((dense, config) for config in (rest[:1] if chosen else rest))]
    if balanced_fits(spec) and tokens == 1:
        (large, small), leaner = BALANCED_ONE, [(walk, config) for config in WALK]
        return [(balanced, large), *leaner, (balanced, small)]
    if balanced_fits(spec) and tokens <= 16:
        return [(balanced, config) for config in BALANCED]
    return [(sparse, config) for config in (SPARSE_ONE if tokens == 1 else SPARSE_MANY)]


def handed_on(
    spec: MatrixSpec, tokens: int, reader: MatrixSpec | None, dtype: torch.dtype
) -> tuple[torch.dtype, dict[str, bool]]:
    """How the outputs of a matrix go to the codes `reader`, if any: their dtype, and options of the kernel."""
    if reader is None or tokens != 1 or not reader.sparse or not readable(reader):
        return dtype, {}
    return torch.float32, {"spaced": True} if balanced_fits(reader) and not spec.sparse else {}


@lru_cache(maxsize=4096)
def unit(spec: MatrixSpec) -> int:
    """Bits that the balanced kernel loads as one: 64 or 32, where a mask word's values fill whole ones; else 0."""
    return next((size for size in (64, 32) if per_word(spec) * spec.bits % size == 0), 0)


def balanced_fits(spec: MatrixSpec) -> bool:
    """Whether `balanced` reads this: full mask words, whose values begin at whole units, as do the scales' groups."""
    if not spec.sparse or not readable(spec) or spec.columns % 32 or per_word(spec) == 0:
        return False
    return unit(spec) > 0 and spec.group % (unit(spec) // spec.bits) == 0


def pitched(x: Tensor) -> Tensor:
    """Give x (tokens, columns) as the balanced kernel reads it: (planes, mask words, pitch, tokens of a plane).

    In float32 for one token, else in the dtype of x; tokens up to a power of two, at most 8 in a plane.
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
    """Sparse rows that satisfy :func:`balanced_fits`; a few tokens, or one as :func:`pitched` gives it."""
    z = x if x.dim() == 4 else pitched(x)
    tokens = 1 if x.dim() == 4 else x.shape[0]
    out = torch.empty(tokens, spec.rows, dtype=out_dtype, device=x.device)
    values = aligned(packed["values"])
    triton_balanced.balanced_linear_kernel[(parts(spec.rows, config.rows),)](
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
    """Sparse rows that satisfy :func:`balanced_fits`, one token, also as :func:`pitched` gives it."""
    z = x if x.dim() == 4 else pitched(x)
    out = torch.empty(1, spec.rows, dtype=out_dtype, device=x.device)
    values = aligned(packed["values"])
    triton_walk.walk_linear_kernel[(parts(spec.rows, config.rows),)](
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
    """Sparse rows of any pattern; 1 to MOST_TOKENS tokens, x also in float32 where there is one."""
    out = torch.empty(x.shape[0], spec.rows, dtype=out_dtype, device=x.device)
    values, mask = elements(packed, spec), packed["mask"].contiguous()
    triton_kernels.sparse_linear_kernel[(parts(spec.rows, config.rows),)](
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
    """Sparse rows made dense, (rows, columns) `dtype`."""
    values, mask = elements(packed, spec), packed["mask"].contiguous()
    out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=mask.device)
    triton_kernels.expand_kernel[(parts(spec.rows, config.rows),)](
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


def unpacked(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """A matrix that is :func:`readable` and not stored as it is, made dense, (rows, columns) `dtype`."""
    if spec.sparse:
        return expand(packed, spec, dtype, EXPAND)
    return expand_integers(packed, spec, dtype, EXPAND_INTEGERS)
