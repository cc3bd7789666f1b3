"""What the launching functions of all Triton kernels share: launch parameters, and views of stored tensors."""

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
    """Launch parameters: rows and width of a tile (words, or stored elements), lanes to a word, warps, stages."""

    rows: int
    width: int
    warps: int
    lanes: int = 32
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.width} lanes {self.lanes} warps {self.warps} stages {self.stages}"


def pitch(tokens: int) -> int:
    """Columns of z from mask word to mask word in the balanced kernel.

    The j-th set bits of two words lie at about the same place, so with 32 the threads of a warp would meet in the same
    banks of the first-level cache: 5.8 rounds a load for one token, 2.2 with 36 (simulated with random masks; the
    kernel gains little from it on an H200, where integer arithmetic limits it first).
    """
    return 36 if tokens <= 2 else 34 if tokens <= 4 else 33


@lru_cache(maxsize=4096)
def per_word(spec: MatrixSpec) -> int:
    """Values of a full mask word; 0 where it varies (pattern ``"free"``)."""
    balanced = parse_pattern(spec.pattern)
    return 0 if balanced is None else balanced[0] * 32 // balanced[1]


def readable(spec: MatrixSpec) -> bool:
    """Whether a kernel reads the stored values themselves (16, 8, 4, 2 bits; zero points only where dense)."""
    return spec.bits in (16, 8, 4, 2) and (spec.symmetric or not spec.sparse)


def parts(size: int, each: int) -> int:
    """Parts of `each` that hold `size`, the last perhaps not full.

    Triton's own `cdiv` and `next_power_of_2` look at their arguments as a compiler does, microseconds a call.
    """
    return -(-size // each)


def power_of_2(number: int) -> int:
    """The least power of two that is at least `number` >= 1."""
    return 1 << (number - 1).bit_length()


def padded(tokens: int) -> int:
    """Tokens of a tile: 1, or at least 16 for the tensor cores."""
    return 1 if tokens == 1 else max(16, power_of_2(tokens))


def elements(packed: Packed, spec: MatrixSpec) -> Tensor:
    """Values as the element kernels read them: floats, signed bytes, or bytes that hold several or unsigned ones."""
    values = packed["values"].contiguous()
    return values.view(torch.uint8) if values.dtype == torch.int32 else values


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, from an address that 16-byte loads may start at."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@lru_cache(maxsize=4096)
def common(spec: MatrixSpec) -> dict[str, Any]:
    """Constants that the kernels of any matrix take. Shared: not to be changed."""
    return {"BITS": spec.bits, "SCALED": spec.integer, "GROUP": 0 if spec.groups == 1 else spec.group}


def output(x: Tensor, spec: MatrixSpec, dtype: torch.dtype, spaced: bool) -> Tensor:
    """Room for the outputs, (tokens, rows) `dtype`, or as :func:`pitched` would give them."""
    if spaced:
        return torch.empty(1, spec.rows // 32, pitch(1), 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape[0], spec.rows, dtype=dtype, device=x.device)
