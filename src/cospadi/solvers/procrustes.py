"""Sparse coding over an orthonormal dictionary, both steps in closed form (COMPOT, arXiv 2602.15200)."""

import torch
from torch import Tensor

from cospadi.format.patterns import keep_largest


def leading_directions(target: Tensor, count: int) -> Tensor:
    """The `count` leading left singular vectors of Y (d, n), as columns (d, count); count <= d."""
    moments = target.double() @ target.double().T
    vectors: Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors[:, -count:].flip(1).to(target.dtype)


def polar_factor(matrix: Tensor, *, rank: int | None = None) -> Tensor:
    """U Vᵀ for the thin SVD U Σ Vᵀ of a matrix (d, k), k <= d: the nearest matrix with orthonormal columns.

    It maximises tr(DᵀM) over DᵀD = I, which is the Procrustes problem min ‖Y − D S‖² for M = Y Sᵀ. It is computed as M
    (MᵀM)^(−1/2), which is several times faster than an SVD. The SVD is used for (nearly) rank-deficient matrices, where
    the missing directions may be any orthonormal ones.

    Args:
        matrix: M (d, k).
        rank: upper bound on the rank of a square M; smaller singular values are rounding. Among the equally good
            rotations the one nearest to the identity is then returned.
    """
    wide = matrix.double()
    polar: Tensor
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    if float(values[0]) > 1e-10 * float(values[-1]):
        polar = (wide @ (vectors * values.rsqrt())) @ vectors.T
        eye = torch.eye(polar.shape[1], dtype=polar.dtype, device=polar.device)
        for _ in range(2):  # Newton–Schulz: regains the accuracy lost to the squared condition number
            polar = polar @ (1.5 * eye - 0.5 * (polar.T @ polar))
    else:
        u, singular, vt = torch.linalg.svd(wide, full_matrices=False)
        polar = u @ vt
        if rank is not None:
            rank = min(rank, int((singular > len(wide) * torch.finfo(wide.dtype).eps * singular[0]).sum()))
            free_u, free_vt = u[:, rank:], vt[rank:]
            left, _, right = torch.linalg.svd(free_u.T @ free_vt.T)  # W of greatest tr(U₂ W V₂ᵀ)
            polar = u[:, :rank] @ vt[:rank] + free_u @ (left @ right) @ free_vt
    return polar.to(matrix.dtype)


def orthonormal_codes(dictionary: Tensor, target: Tensor, nonzeros: int) -> Tensor:
    """The best codes for an orthonormal dictionary: the `nonzeros` largest entries of every column of DᵀY.

    Args:
        dictionary: D (d, k), DᵀD = I.
        target: Y (d, n).
        nonzeros: per column.

    Returns:
        S (k, n).
    """
    dense = dictionary.T @ target
    return dense * keep_largest(dense, nonzeros)


def procrustes(
    target: Tensor,
    atoms: int,
    nonzeros: int,
    *,
    rounds: int = 20,
) -> tuple[Tensor, Tensor, list[float]]:
    """Factor Y ≈ D S with DᵀD = I and `nonzeros` coefficients in every column of S.

    Each round computes the best dictionary for the codes and then the best codes for the dictionary, so the error never
    rises.

    Args:
        target: Y (d, n), float32 or float64.
        atoms: k <= d.
        nonzeros: s, 0 < s <= k.
        rounds: of dictionary and codes; with 0 the dictionary is the leading singular vectors.

    Returns:
        D (d, k), S (k, n) and ‖Y − D S‖² at the start and after each round.

    Raises:
        ValueError: if there are more atoms than rows.
    """
    if atoms > target.shape[0]:
        raise ValueError(f"{atoms} atoms of {target.shape[0]} entries cannot be orthonormal")
    energy = float(target.double().square().sum())
    dictionary = leading_directions(target, atoms)
    codes = orthonormal_codes(dictionary, target, nonzeros)
    losses = [energy - float(codes.double().square().sum())]  # DᵀD = I: the error is the energy outside the codes
    for _ in range(rounds):
        dictionary = polar_factor(target @ codes.T)
        codes = orthonormal_codes(dictionary, target, nonzeros)
        losses.append(energy - float(codes.double().square().sum()))
    return dictionary, codes, losses
