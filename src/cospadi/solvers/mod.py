"""The method of optimal directions: the dictionary that fits given codes best, by least squares.

Reference: Engan, Aase, Husøy, ICASSP 1999; the ridge as in ROCKET (arXiv 2602.11008, dictionary refit).
"""

import torch
from torch import Tensor


def mod_update(target: Tensor, codes: Tensor, fallback: Tensor | None = None, ridge: float = 1e-6) -> Tensor:
    """D = Y Sᵀ (S Sᵀ + μ I)⁻¹, the minimiser of ‖Y − D S‖² + μ ‖D‖².

    Args:
        target: Y (d, n).
        codes: S (k, n).
        fallback: (d, k), whose columns stand in for atoms that no code uses; None: zero columns.
        ridge: μ as a share of the mean diagonal entry of S Sᵀ; grown tenfold while the system is not positive definite.

    Returns:
        D (d, k) in the target's dtype; solved in float64.
    """
    wide = codes.double()
    normal = wide @ wide.T
    diagonal = normal.diagonal()
    used = diagonal > 0
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(normal.shape[0], dtype=normal.dtype, device=normal.device)
    factor, failed = torch.linalg.cholesky_ex(normal + ridge * mean * eye)
    share = max(ridge, 1e-12)
    while failed and share < 1:
        share *= 10
        factor, failed = torch.linalg.cholesky_ex(normal + share * mean * eye)
    dictionary = torch.cholesky_solve(wide @ target.double().T, factor).T.to(target.dtype)
    if fallback is not None:
        dictionary = torch.where(used, dictionary, fallback)
    return dictionary


def unit_atoms(dictionary: Tensor, codes: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale atoms to unit norm and codes inversely: D S stays the same.

    Args:
        dictionary: D (d, k); zero columns stay zero.
        codes: S (k, n).
        norms: (k,) norms of the atoms in another metric; None: Euclidean.

    Returns:
        scaled D and S.
    """
    if norms is None:
        norms = torch.linalg.vector_norm(dictionary, dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    return dictionary / norms, codes * norms.unsqueeze(1)
