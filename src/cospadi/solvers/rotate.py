"""Rotating a group of matrices: weights and Gram of z = ((x ⊙ σ ⊙ ε) B), in which no input stands out.

With T = diag(σ ε) B, weights W (d_in, d_out) become W' = T⁻¹ W and the Gram G becomes Tᵀ G T. B is block diagonal with
orthonormal Walsh–Hadamard matrices, so the inputs of a block share their outliers. Signs at random keep a structure of
the weights from meeting that of B (QuIP#, arXiv 2402.04396).
"""

import torch
from torch import Tensor

from cospadi.format.hadamard import hadamard

LEAST = 1e-2
"""Smallest scale, as a share of the mean: for inputs that no weight reads."""


def random_signs(size: int, seed: int) -> Tensor:
    """Signs ε float32 (size,) on the CPU, the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def input_scales(rows: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Scales σ of the inputs: the RMS of each input's weights, over its mean.

    After the division every input has weights of the same size. Under error feedback only the product of the scales
    counts in the Gram, and the even weights are what is left to gain (the recipe of EXL3).

    Args:
        rows: (outputs of all matrices that read the inputs, d_in).
        dtype: in which the scales are stored.

    Returns:
        float32 (d_in,), exact in `dtype`, positive; 1 where all weights are zero.
    """
    size = rows.double().square().mean(0).sqrt()
    mean = size.mean()
    if not mean > 0:
        return torch.ones_like(size, dtype=torch.float32)
    return (size / mean).clamp_min(LEAST).to(dtype).float()


def rotated_rows(rows: Tensor, signs: Tensor, scales: Tensor | None, block: int) -> Tensor:
    """Weights for the rotated input: rows (…, d_in) of W'ᵀ = (T⁻¹ W)ᵀ, float32."""
    factors = signs.to(rows.device, torch.float64)
    factors = factors if scales is None else factors / scales.to(rows.device, torch.float64)
    return hadamard(rows.double() * factors, block).float()


def unrotated_rows(rows: Tensor, signs: Tensor, scales: Tensor | None, block: int) -> Tensor:
    """Inverse of :func:`rotated_rows`: the weights that rotated ones stand for, float32."""
    factors = signs.to(rows.device, torch.float64)
    factors = factors if scales is None else factors * scales.to(rows.device, torch.float64)
    return (hadamard(rows.double(), block) * factors).float()


def rotated_gram(gram: Tensor, signs: Tensor, scales: Tensor | None, block: int) -> Tensor:
    """The Gram of the rotated input: Tᵀ G T, float64 (d_in, d_in)."""
    factors = signs.to(gram.device, torch.float64)
    factors = factors if scales is None else factors * scales.to(gram.device, torch.float64)
    half = hadamard(gram.double() * factors[:, None] * factors, block)
    turned = hadamard(half.T.contiguous(), block)
    return (turned + turned.T) / 2
