"""Low-rank factors: truncated singular value decompositions in several metrics, and least squares for one factor.

Each minimises ‖R (W − D S)‖_F for some root R of the inputs' second moments: R = I for the plain SVD, a diagonal R for
the weighted SVDs (FWSVD, ASVD), RᵀR = G for the truncation-aware ones (SVD-LLM).
"""

import torch
from torch import Tensor

from cospadi.solvers.linalg import ridged_cholesky
from cospadi.solvers.whitening import Whitening


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values, from the eigendecomposition of the smaller Gram in float64.

    A symmetric eigenproblem of size min(m, n) is several times faster than a full SVD. The vectors are orthonormal up
    to rounding. Singular values below 1e-8 of the largest are accurate only in absolute terms, which changes the
    truncation error by no more than the float64 rounding of ‖matrix‖².

    Args:
        matrix: (m, n), any float dtype.

    Returns:
        vectors (m, min(m, n)) and singular values (min(m, n),), both float64, largest first.
    """
    matrix = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        basis, square = None, matrix
    else:
        basis, square = torch.linalg.qr(matrix)
    values, vectors = torch.linalg.eigh(square @ square.T)
    vectors = vectors.flip(1)
    return vectors if basis is None else basis @ vectors, values.flip(0).clamp_min(0).sqrt()


def spectrum(matrix: Tensor) -> Tensor:
    """Singular values (min(m, n),) of a matrix (m, n), float64, largest first."""
    return left_singular(matrix)[1]


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a given rank (Eckart and Young).

    Args:
        matrix: (m, n).
        rank: 1 to min(m, n).

    Returns:
        U (m, rank) with orthonormal columns and C = Uᵀ matrix (rank, n), both float64.

    Raises:
        ValueError: if the rank is out of range.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} of a matrix {tuple(matrix.shape)} is not possible")
    vectors = left_singular(matrix)[0][:, :rank].contiguous()
    return vectors, vectors.T @ matrix.double()


def whitened(weight: Tensor, whitening: Whitening, rank: int) -> tuple[Tensor, Tensor]:
    """Minimiser of ‖L (W − D S)‖_F over rank-r products (SVD-LLM, arXiv 2403.07378, section 3.1).

    The i-th singular value of L W is exactly the output error of dropping it.

    Args:
        weight: W (d_in, d_out).
        whitening: L and its inverse.
        rank: r.

    Returns:
        D (d_in, r) = L⁻¹ U and S (r, d_out) = Uᵀ L W, both float64.
    """
    vectors, codes = truncated(whitening.apply(weight.double()), rank)
    return whitening.undo(vectors), codes


def weighted(weight: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Minimiser of ‖diag(scale) (W − D S)‖_F over rank-r products.

    Args:
        weight: W (d_in, d_out).
        scale: (d_in,), non-negative. Entries below a millionth of the largest are raised to it, which bounds the
            inverse. If all are zero, all count as equal.
        rank: r.

    Returns:
        D (d_in, r) and S (r, d_out), both float64.
    """
    scale = scale.double()
    peak = scale.max()
    scale = torch.where(peak > 0, scale.clamp_min(1e-6 * peak), torch.ones_like(scale))[:, None]
    vectors, codes = truncated(scale * weight.double(), rank)
    return vectors / scale, codes


def eigen_whitening(gram: Tensor, ridge: float = 1e-6) -> Whitening:
    """Whitening by the root √Λ Qᵀ of G = Q Λ Qᵀ (SVD-LLM V2, arXiv 2503.12340, section 3.2).

    Args:
        gram: (d_in, d_in) symmetric, positive semi-definite up to rounding.
        ridge: smallest eigenvalue allowed, as a share of the mean. Unlike an added ridge it leaves larger ones
            unchanged.

    Returns:
        root and inverse in float64; the identity if the Gram is all zero.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    mean = values.clamp_min(0).mean()
    if mean <= 0:
        eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
        return Whitening(eye, eye)
    root = values.clamp_min(ridge * mean).sqrt()
    return Whitening(root[:, None] * vectors.T, vectors / root)


def fit_codes(dictionary: Tensor, weight: Tensor, gram: Tensor, ridge: float = 1e-9) -> Tensor:
    """Codes that minimise ‖X W − X D S‖_F for a given dictionary: (DᵀGD)⁻¹ DᵀG W.

    The second step of SVD-LLM (section 3.2) and the update of Basis Sharing (arXiv 2410.03765, section 3.3).

    Args:
        dictionary: D (d_in, k).
        weight: W (d_in, d_out).
        gram: G (d_in, d_in).
        ridge: added to the normal equations, as a share of their mean diagonal; grown tenfold until they can be
            factorised.

    Returns:
        S (k, d_out) float64; zero if the dictionary or the Gram is zero.

    Raises:
        ValueError: if the Gram is far from positive semi-definite, or holds NaN.
    """
    dictionary, gram = dictionary.double(), gram.double()
    half = gram @ dictionary
    codes: Tensor = torch.cholesky_solve(half.T @ weight.double(), ridged_cholesky(dictionary.T @ half, ridge))
    return codes


def unit_variance(dictionary: Tensor, codes: Tensor, gram: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Scale atoms so that every coordinate of x D has unit variance on calibration text. D S is unchanged.

    Args:
        dictionary: D (d_in, k).
        codes: S (k, d_out).
        gram: G (d_in, d_in).
        ridge: smallest energy of an atom, as a share of its energy under a flat spectrum. Without it an atom that
            calibration never excites would grow without bound.

    Returns:
        the scaled D and S. Zero atoms are left as they are.
    """
    flat = gram.diagonal().double().mean() * dictionary.square().sum(0)
    energy = torch.einsum("ik,ik->k", dictionary, gram.to(dictionary.dtype) @ dictionary)
    scale = torch.maximum(energy, ridge * flat).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return dictionary / scale, codes * scale[:, None]
