"""The orthonormal Walsh–Hadamard transform in blocks, for any length."""

from __future__ import annotations

import torch
from torch import Tensor


def block_sizes(n: int, block: int) -> list[int]:
    """Sizes of the blocks that cover n entries: whole blocks, then the remainder in falling powers of two.

    With block 128, 576 entries are 4 blocks of 128 and one of 64; 84 entries are blocks of 64, 16 and 4.

    Args:
        n: entries, at least 0.
        block: largest block, a power of two.

    Raises:
        ValueError: if `block` is no power of two.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block of {block} is not possible; it must be a power of two")
    rest = n % block
    return [block] * (n // block) + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def hadamard(x: Tensor, block: int) -> Tensor:
    """Compute x B; B is block diagonal with orthonormal Walsh–Hadamard matrices of :func:`block_sizes`.

    The matrices are in natural order; B is symmetric and its own inverse. Only sums, differences and one product per
    block are computed, in a fixed order: the result does not depend on the device, and no setting for matrix products
    (TF32, autocast) touches it.

    Args:
        x: (…, n) float; computed in its dtype.
        block: largest block, a power of two.

    Returns:
        (…, n), of the dtype of x.
    """
    n = x.shape[-1]
    rest = block_sizes(n % block, block)
    whole = n - sum(rest)
    parts = [_blocks(x[..., :whole], block)] if whole else []
    start = whole
    for size in rest:
        parts.append(_blocks(x[..., start : start + size], size))
        start += size
    if not parts:
        return x
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _blocks(x: Tensor, block: int) -> Tensor:
    """The transform of blocks of one size; the last dimension is a multiple of it."""
    shape, half = x.shape, 1
    while half < block:
        first, second = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half).unbind(-2)
        x = torch.stack((first + second, first - second), -2).reshape(shape)
        half *= 2
    scaled: Tensor = x * block**-0.5
    return scaled
