"""Shared by the functions that launch Triton kernels: launch parameters, and views of stored tensors."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.format.patterns import parse_pattern

FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Config:
    """Launch parameters: rows and width of a tile (in words or stored elements), lanes per word, warps, stages."""

    rows: int
    width: int
    warps: int
    lanes: int = 32
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.width} lanes {self.lanes} warps {self.warps} stages {self.stages}"


def pitch(tokens: int) -> int:
    """Columns of z from one mask word to the next in the balanced kernel.

    The j-th set bits of two words are at about the same position. With a pitch of 32 the threads of a warp would access
    the same banks of the L1 cache: 5.8 rounds per load for one token, against 2.2 with 36 (simulated with random masks;
    on an H200 the kernel gains little from it, because integer arithmetic limits it first).
    """
    return 36 if tokens <= 2 else 34 if tokens <= 4 else 33


@lru_cache(maxsize=4096)
def per_word(spec: MatrixSpec) -> int:
    """Values per full mask word; 0 if the number varies (pattern ``"free"``)."""
    balanced = parse_pattern(spec.pattern)
    return 0 if balanced is None else balanced[0] * 32 // balanced[1]


def readable(spec: MatrixSpec) -> bool:
    """Whether a kernel reads this spec: 16, 8, 4 or 2 bits, no trellis; zero points and half steps only if dense."""
    return spec.bits in (16, 8, 4, 2) and spec.trellis is None and (spec.centred or not spec.sparse)


def parts(size: int, each: int) -> int:
    """How many parts of `each` hold `size`; the last part may not be full.

    Triton's own `cdiv` and `next_power_of_2` inspect their arguments as a compiler does, which takes microseconds.
    """
    return -(-size // each)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number` >= 1."""
    return 1 << (number - 1).bit_length()


def padded(tokens: int) -> int:
    """Tokens per tile: 1, or at least 16 for the tensor cores."""
    return 1 if tokens == 1 else max(16, power_of_2(tokens))


def elements(packed: Packed, spec: MatrixSpec) -> Tensor:
    """Values as the kernels read them element by element: floats, signed bytes, or bytes of packed levels."""
    values = packed["values"].contiguous()
    return values.view(torch.uint8) if values.dtype == torch.int32 else values


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and aligned for loads of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@lru_cache(maxsize=4096)
def common(spec: MatrixSpec) -> dict[str, Any]:
    """Constants that all kernels take. The dictionary is shared: do not change it."""
    return {"BITS": spec.bits, "SCALED": spec.integer, "GROUP": 0 if spec.groups == 1 else spec.group}


def output(x: Tensor, spec: MatrixSpec, dtype: torch.dtype, spaced: bool) -> Tensor:
    """An empty tensor for the outputs: (tokens, rows) in `dtype`, or with `spaced` in the layout of `pitched`."""
    if spaced:
        return torch.empty(1, spec.rows // 32, pitch(1), 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape[0], spec.rows, dtype=dtype, device=x.device)
