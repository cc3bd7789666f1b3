"""Hard-thresholding pursuit: choose a support by a projected gradient step, then solve least squares on it.

Reference: Foucart, "Hard thresholding pursuit", 2011; in the form of GeoPair (arXiv 2609.25963). Codes are given by
H = DᵀGD and R = DᵀGW alone, so that any metric G serves: the error is tr(CᵀHC) − 2 tr(CᵀR) + tr(WᵀGW).
"""

import torch
from torch import Tensor

from cospadi.format.patterns import support


def largest_eigenvalue(matrix: Tensor, iterations: int = 40) -> Tensor:
    """A close upper estimate of the largest eigenvalue of a positive semi-definite matrix, 0-dim, on its device.

    Power iteration finds it from below; 2 % on top make up for that, and the largest absolute row sum bounds it.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    start = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0)).to(matrix)
    vector = start / torch.linalg.vector_norm(start)
    size = torch.zeros_like(vector[0])
    for _ in range(iterations):
        vector = matrix @ vector
        size = torch.linalg.vector_norm(vector)
        vector = vector / size.clamp_min(tiny)
    return torch.minimum(1.02 * size, matrix.abs().sum(1).amax())


def restricted_least_squares(
    gram: Tensor, products: Tensor, codes: Tensor, mask: Tensor, *, iterations: int = 10, tolerance: float = 1e-5
) -> Tensor:
    """Minimise cᵀHc − 2cᵀr for every column over its own support, by conjugate gradients on all columns at once.

    Args:
        gram: H (k, k), symmetric positive definite on every support.
        products: R (k, n).
        codes: C (k, n), where to start; zero outside of `mask`.
        mask: bool (k, n).
        iterations: at most so many; a column stops when its residual is below `tolerance` times its |R| on the support.
        tolerance: relative.

    Returns:
        C (k, n), zero outside of `mask`, in no column worse than at the start.
    """
    inside = mask.to(codes.dtype)
    residual = (products - gram @ codes) * inside
    enough = (tolerance * tolerance) * (products * inside).square().sum(0)
    direction = residual
    energy = residual.square().sum(0)
    for _ in range(iterations):
        image = (gram @ direction) * inside
        curvature = (direction * image).sum(0)
        going = (energy > enough) & (curvature > 0)
        step = torch.where(going, energy / curvature, 0.0)
        codes = codes + step * direction
        residual = residual - step * image
        renewed = residual.square().sum(0)
        direction = residual + torch.where(going, renewed / energy, 0.0) * direction
        energy = torch.where(going, renewed, energy)
    return codes


def htp(
    gram: Tensor,
    products: Tensor,
    codes: Tensor,
    nonzeros: int,
    *,
    pattern: str = "free",
    steps: int = 2,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> Tensor:
    """Sparse codes by `steps` of hard-thresholding pursuit; the error never rises once `codes` are sparse.

    Args:
        gram: H = DᵀGD + εI (k, k).
        products: R = DᵀGW (k, n).
        codes: C (k, n), where to start: earlier codes, or the dense solution H⁻¹R.
        nonzeros: per column.
        pattern: see `cospadi.format.patterns`.
        steps: gradient step, projection, least squares on the support; each.
        iterations: of conjugate gradients.
        tolerance: of conjugate gradients.

    Returns:
        C (k, n) with at most `nonzeros` non-zeros in every column.
    """
    size = 1 / largest_eigenvalue(gram).clamp_min(torch.finfo(gram.dtype).tiny)
    for _ in range(steps):
        moved = codes + size * (products - gram @ codes)
        mask = support(moved, nonzeros, pattern)
        codes = restricted_least_squares(gram, products, moved * mask, mask, iterations=iterations, tolerance=tolerance)
    return codes


def dense_codes(gram: Tensor, products: Tensor) -> Tensor:
    """H⁻¹R (k, n), the codes without any constraint on their number, for positive definite H (k, k)."""
    return torch.cholesky_solve(products, torch.linalg.cholesky(gram))
