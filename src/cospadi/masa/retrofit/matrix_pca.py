"""Matrix PCA: few matrices whose combinations come closest to many of the same shape (MASA, arXiv 2508.04581).

The principal components of vec(W_1) … vec(W_L) follow from the L×L matrix K_lm = ⟨W_l, W_m⟩ alone: with K v_s = λ_s v_s
the atom of unit norm is A_s = Σ_l v_ls W_l / √λ_s. The covariance of the entries, (d_in·d_out)², is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-10
"""Eigenvalues of K below this share of the largest count as zero: such matrices depend linearly on the others."""
_ROWS_AT_ONCE = 256


def inner_products(weights: Sequence[Tensor], gram: Tensor | None = None) -> Tensor:
    """All inner products of matrices of one shape, K_lm = tr(W_lᵀ G W_m).

    Args:
        weights: W_l (d_in, d_out), any float dtype, on one device.
        gram: G (d_in, d_in) positive semi-definite; None for the identity, which gives the Frobenius inner product.

    Returns:
        K (L, L) float64, symmetric.

    Raises:
        ValueError: if the shapes differ.
    """
    shapes = {tuple(w.shape) for w in weights}
    if len(shapes) != 1:
        raise ValueError(f"matrices of unequal shapes have no inner products: {sorted(shapes)}")
    rows = weights[0].shape[0]
    total = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights[0].device)
    for begin in range(0, rows, _ROWS_AT_ONCE):  # blocks of rows: no float64 copy of all matrices at once
        end = min(begin + _ROWS_AT_ONCE, rows)
        part = torch.stack([w[begin:end].double().reshape(-1) for w in weights])
        if gram is None:
            total += part @ part.T
        else:
            strip = gram[begin:end].double()
            total += part @ torch.stack([(strip @ w.double()).reshape(-1) for w in weights]).T
    return (total + total.T) / 2


def principal_mixtures(products: Tensor, atoms: int | None = None) -> Tensor:
    """How to mix the matrices into orthonormal atoms, the principal ones first.

    Args:
        products: K (L, L) of :func:`inner_products`.
        atoms: how many, 0 to L; None for all.

    Returns:
        T (L, S) float64: A_s = Σ_l T_ls W_l has unit norm and is orthogonal to the others in the inner product of K.
        S is less than `atoms` where fewer of the matrices are linearly independent.

    Raises:
        ValueError: if more atoms are asked for than there are matrices.
    """
    count = products.shape[0]
    wanted = count if atoms is None else atoms
    if not 0 <= wanted <= count:
        raise ValueError(f"{wanted} atoms of {count} matrices are not possible")
    values, vectors = torch.linalg.eigh(products.double())
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(wanted, int((values > TOLERANCE * values[0].clamp_min(0)).sum()))
    mixtures: Tensor = vectors[:, :kept] / values[:kept].sqrt()
    if kept == 0:
        return mixtures
    # Dividing by small roots magnifies rounding; a Cholesky step restores orthonormality and mixes no later atoms in.
    factor = torch.linalg.cholesky(mixtures.T @ products.double() @ mixtures)
    orthonormal: Tensor = torch.linalg.solve_triangular(factor, mixtures.T, upper=False).T.contiguous()
    return orthonormal


def mix(weights: Sequence[Tensor], mixture: Tensor) -> Tensor:
    """Σ_l t_l W_l in float64.

    Args:
        weights: W_l of one shape.
        mixture: t (L,).
    """
    total = torch.zeros(weights[0].shape, dtype=torch.float64, device=weights[0].device)
    for weight, share in zip(weights, mixture.tolist(), strict=True):
        if share:
            total += share * weight.double()
    return total


def matrix_pca(weights: Sequence[Tensor], atoms: int) -> tuple[Tensor, Tensor]:
    """The orthonormal atoms that hold the most of all matrices, and the coefficients (section "Matrix PCA").

    Minimises Σ_l ‖W_l − Σ_s c_ls A_s‖² over atoms with tr(A_iᵀ A_j) = δ_ij and c_ls = tr(A_sᵀ W_l). What is left is the
    sum of the smaller eigenvalues of K; with S = L it is zero.

    Args:
        weights: W_l (d_in, d_out).
        atoms: S, 1 to L.

    Returns:
        A (S, d_in, d_out) and C (L, S), float64; fewer atoms where fewer matrices are linearly independent.

    Raises:
        ValueError: if the shapes differ or S is out of range.
    """
    products = inner_products(weights)
    mixtures = principal_mixtures(products, atoms)
    if mixtures.shape[1] == 0:
        return torch.zeros(0, *weights[0].shape, dtype=torch.float64, device=products.device), mixtures
    return torch.stack([mix(weights, column) for column in mixtures.T]), products @ mixtures
