"""Linear algebra shared by the solvers: guarded Cholesky factors, power iteration, least squares on a support."""

import torch
from torch import Tensor

LEAST_RIDGE = 1e-12
MOST_RIDGE = 1e-2
"""What needs more than this, as a share of the mean diagonal, is not positive semi-definite up to rounding."""


def ridged_cholesky(matrix: Tensor, ridge: float = 0.0, most: float = MOST_RIDGE) -> Tensor:
    """Lower Cholesky factor of M + ridge · mean(diag M) · I.

    Rounding can leave a positive semi-definite matrix slightly indefinite. While the factorisation fails, a ridge ten
    times as large is added on top.

    Args:
        matrix: M (n, n), symmetric, positive semi-definite up to rounding; float64.
        ridge: to start with, as a share of the mean diagonal.
        most: the largest ridge to try.

    Returns:
        L (n, n) float64.

    Raises:
        ValueError: if even the largest ridge is not enough: M is indefinite, or holds NaN.
    """
    shifted = matrix.clone()
    diagonal = shifted.diagonal()
    while True:
        diagonal += ridge * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor
        if ridge >= most:
            raise ValueError("the matrix is not positive semi-definite, or holds NaN")
        ridge = max(ridge, LEAST_RIDGE) * 10


def leading_vector(matrix: Tensor, start: Tensor | None = None, iterations: int = 40) -> Tensor:
    """Approximate the leading eigenvector of a positive semi-definite matrix by power iteration.

    For a unit vector v both vᵀMv and ‖Mv‖ approach the largest eigenvalue from below, so a caller that needs an upper
    bound adds a margin.

    Args:
        matrix: M (n, n), symmetric positive semi-definite.
        start: (n,) vector to start from, for example the one found earlier for a similar matrix; None: a fixed random
            unit vector.
        iterations: matrix-vector products.

    Returns:
        (n,) unit vector; zero where the matrix is zero.
    """
    if start is None:
        start = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0)).to(matrix)
        start = start / torch.linalg.vector_norm(start)
    vector, tiny = start, torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        vector = matrix @ vector
        vector = vector / torch.linalg.vector_norm(vector).clamp_min(tiny)
    return vector


def restricted_least_squares(
    gram: Tensor,
    products: Tensor,
    codes: Tensor,
    mask: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    dim: int = 0,
) -> Tensor:
    """Least-squares codes on a fixed support, by conjugate gradients on all columns at once.

    Minimises cᵀHc − 2cᵀr for every column c of C over the entries that its mask admits. H = DᵀGD and R = DᵀGW are all
    that is needed, so any metric G serves.

    Args:
        gram: H (k, k), symmetric positive definite on every support.
        products: R (k, n); with ``dim=1`` its transpose.
        codes: C (k, n) to start from, zero outside the mask; with ``dim=1`` its transpose.
        mask: bool, shaped as the codes.
        iterations: at most this many steps.
        tolerance: a column stops once its residual norm falls below `tolerance` times the norm of R on its support.
        dim: the dimension along which the atoms lie: 0 for C (k, n), 1 for Cᵀ (n, k).

    Returns:
        the codes, shaped as given, zero outside the mask. No column's objective is higher than at the start.
    """
    inside = mask.to(codes.dtype)

    def image_of(x: Tensor) -> Tensor:
        return gram @ x if dim == 0 else x @ gram

    def energy_of(x: Tensor) -> Tensor:
        return x.square().sum(dim, keepdim=True)

    residual = (products - image_of(codes)) * inside
    enough = tolerance**2 * energy_of(products * inside)
    direction, energy = residual, energy_of(residual)
    for _ in range(iterations):
        image = image_of(direction) * inside
        curvature = (direction * image).sum(dim, keepdim=True)
        going = (energy > enough) & (curvature > 0)
        step = torch.where(going, energy / curvature, 0.0)
        codes = codes + step * direction
        residual = residual - step * image
        renewed = energy_of(residual)
        direction = residual + torch.where(going, renewed / energy, 0.0) * direction
        energy = torch.where(going, renewed, energy)
    return codes
