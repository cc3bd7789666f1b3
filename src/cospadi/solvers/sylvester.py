"""The best dictionary for weights whose inputs differ: a generalised Sylvester equation.

min_D Σ_i ‖L_i (W_i − D C_i)‖² with L_iᵀL_i = G_i has the normal equations G₁ D B₁ + G₂ D B₂ = K with B_i = C_i C_iᵀ and
K = Σ G_i W_i C_iᵀ. After diagonalising both pairs simultaneously, one division per entry solves them (GeoPair, arXiv
2609.25963).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.solvers.linalg import ridged_cholesky


@dataclass(frozen=True)
class Pencil:
    """Simultaneous diagonalisation of symmetric A (positive definite) and B: VᵀAV = I, VᵀBV = diag(values)."""

    vectors: Tensor
    values: Tensor


def diagonalise(first: Tensor, second: Tensor) -> Pencil:
    """Generalised eigenvalues and eigenvectors of B v = λ A v, in float64.

    Args:
        first: A (n, n), symmetric positive definite.
        second: B (n, n), symmetric.

    Raises:
        ValueError: if `first` is not positive semi-definite up to rounding, or holds NaN.
    """
    factor = ridged_cholesky(first.double())
    half = torch.linalg.solve_triangular(factor, second.double(), upper=False)
    reduced = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, rotation = torch.linalg.eigh((reduced + reduced.T) / 2)
    return Pencil(torch.linalg.solve_triangular(factor.T, rotation, upper=True), values)


def sylvester_update(metrics: Pencil, moments: Pencil, right: Tensor) -> Tensor:
    """Solve G₁ D B₁ + G₂ D B₂ = K in closed form.

    Args:
        metrics: pencil of (G₁, G₂), (d, d); the same in every round.
        moments: pencil of (B₁, B₂), (k, k).
        right: K (d, k).

    Returns:
        D (d, k) float64.
    """
    p, q = metrics.vectors, moments.vectors
    rotated = p.T @ right.double() @ q
    return p @ (rotated / (1 + torch.outer(metrics.values, moments.values))) @ q.T


def shared_update(
    grams: Sequence[Tensor],
    moments: Sequence[Tensor],
    right: Tensor,
    start: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 1e-10,
) -> Tensor:
    """Solve Σ G_i D B_i = K for any number of pairs, by conjugate gradients.

    The preconditioner solves the equation for equal Grams, so few iterations suffice if the Grams are similar.

    Args:
        grams: G_i (d, d), symmetric positive definite.
        moments: B_i (k, k), symmetric positive definite.
        right: K (d, k).
        start: D (d, k) to start from, such as an earlier dictionary.
        iterations: maximum number.
        tolerance: on the preconditioned residual, relative to that of D = 0.

    Returns:
        D (d, k) float64; its objective never exceeds that of `start`.
    """
    pairs = [(g.double(), b.double()) for g, b in zip(grams, moments, strict=True)]
    left = ridged_cholesky(torch.stack([g for g, _ in pairs]).mean(0))
    moment = ridged_cholesky(torch.stack([b for _, b in pairs]).sum(0))

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x, left).T, moment).T

    dictionary, right = start.double(), right.double()
    residual = right - sum((g @ dictionary @ b for g, b in pairs), torch.zeros_like(right))
    solved = precondition(residual)
    direction, energy = solved, float((residual * solved).sum())
    enough = tolerance**2 * float((right * precondition(right)).sum())
    for _ in range(iterations):
        if energy <= enough:
            break
        image = sum((g @ direction @ b for g, b in pairs), torch.zeros_like(right))
        step = energy / float((direction * image).sum())
        dictionary = dictionary + step * direction
        residual = residual - step * image
        solved = precondition(residual)
        renewed = float((residual * solved).sum())
        direction, energy = solved + (renewed / energy) * direction, renewed
    return dictionary
