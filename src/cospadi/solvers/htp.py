"""Hard-thresholding pursuit: a projected gradient step chooses a support, then least squares is solved on it.

Reference: Foucart, "Hard thresholding pursuit", 2011; in the form of GeoPair (arXiv 2609.25963). The codes depend on
H = DᵀGD and R = DᵀGW alone, so any metric G can be used: the error is tr(CᵀHC) − 2 tr(CᵀR) + tr(WᵀGW).
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
    """Sparse codes by hard-thresholding pursuit. Once the codes are sparse, no step raises the error.

    Args:
        gram: H = DᵀGD + εI (k, k).
        products: R = DᵀGW (k, n).
        codes: C (k, n) to start from: earlier codes, or the dense solution H⁻¹R.
        nonzeros: per column; ignored for ``"n:m"``.
        pattern: see `cospadi.format.patterns`.
        steps: how often to take a gradient step, project, and solve least squares on the support.
        iterations: of conjugate gradients per step.
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
    """H⁻¹R (k, n), the codes without a sparsity constraint, for positive semi-definite H (k, k)."""
    return torch.cholesky_solve(products, ridged_cholesky(gram))
