"""The method of optimal directions (MOD): the least-squares dictionary for given codes.

Reference: Engan, Aase, Husøy, ICASSP 1999; the ridge as in ROCKET (arXiv 2602.11008, dictionary refit).
"""

import torch
from torch import Tensor

from cospadi.solvers.linalg import ridged_cholesky


def least_squares_dictionary(
    target: Tensor,
    codes: Tensor,
    *,
    ridge: float = 1e-6,
    fallback: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """D = Y Sᵀ (S Sᵀ + μ I)⁻¹, the minimiser of ‖Y − D S‖² + μ ‖D‖².

    Args:
        target: Y (d, n).
        codes: S (k, n).
        ridge: μ as a share of the mean diagonal entry of S Sᵀ; grown tenfold while the system is not positive definite.
        fallback: (d, k) whose columns replace atoms that no code uses; None: such atoms become zero.
        dtype: in which S Sᵀ and Y Sᵀ are formed. float32 is several times faster on most GPUs. The system is always
            solved in float64.

    Returns:
        D (d, k) in the target's dtype.

    Raises:
        ValueError: if the codes hold NaN.
    """
    wide = codes.to(dtype)
    normal = (wide @ wide.T).double()
    right = (target.to(dtype) @ wide.T).double()
    factor = ridged_cholesky(normal, ridge, most=1.0)  # float32 products may be far from positive definite
    dictionary: Tensor = torch.cholesky_solve(right.T, factor).T.to(target.dtype)
    if fallback is not None:
        dictionary = torch.where(normal.diagonal() > 0, dictionary, fallback)
    return dictionary


def unit_atoms(dictionary: Tensor, codes: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale atoms to unit norm and codes inversely. D S is unchanged.

    Args:
        dictionary: D (d, k); zero columns stay zero.
        codes: S (k, n).
        norms: (k,) norms of the atoms in another metric; None: Euclidean norms.

    Returns:
        the scaled D and S.
    """
    if norms is None:
        norms = torch.linalg.vector_norm(dictionary, dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    return dictionary / norms, codes * norms.unsqueeze(1)
