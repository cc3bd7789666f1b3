"""Hard-thresholding pursuit: choose a support by a projected gradient step, then solve least squares on it.

Reference: Foucart, "Hard thresholding pursuit", 2011; in the form of GeoPair (arXiv 2609.25963). Codes are given by
H = DᵀGD and R = DᵀGW alone, so that any metric G serves: the error is tr(CᵀHC) − 2 tr(CᵀR) + tr(WᵀGW).
"""

import torch
from torch import Tensor

from cospadi.format.patterns import keep_largest
from cospadi.solvers.linalg import leading_vector, restricted_least_squares, ridged_cholesky

MARGIN = 1.02
"""On the estimate of the largest eigenvalue, which power iteration approaches from below."""


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
    largest = torch.linalg.vector_norm(gram @ leading_vector(gram, iterations=39))
    bound = torch.minimum(MARGIN * largest, gram.abs().sum(1).amax())
    size = 1 / bound.clamp_min(torch.finfo(gram.dtype).tiny)
    for _ in range(steps):
        moved = codes + size * (products - gram @ codes)
        mask = keep_largest(moved, nonzeros, pattern)
        codes = restricted_least_squares(gram, products, moved * mask, mask, iterations=iterations, tolerance=tolerance)
    return codes


def dense_codes(gram: Tensor, products: Tensor) -> Tensor:
    """H⁻¹R (k, n), the codes without any constraint on their number, for positive definite H (k, k)."""
    return torch.cholesky_solve(products, ridged_cholesky(gram))
