"""Whitening: the change of coordinates in which a layer's output error is a plain Frobenius norm.

With G = XᵀX / tokens and LᵀL = G: ‖X W − X W̃‖² / tokens = ‖L (W − W̃)‖² (CoSpaDi, arXiv 2509.22075, Eq. 4-6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """A root L of a Gram matrix and its inverse, both (d_in, d_in) float64."""

    root: Tensor
    inverse: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """L W for a weight (d_in, d_out), in the weight's dtype."""
        return self.root.to(weight.dtype) @ weight

    def undo(self, dictionary: Tensor) -> Tensor:
        """L⁻¹ D for a whitened dictionary (d_in, k), in the dictionary's dtype."""
        return self.inverse.to(dictionary.dtype) @ dictionary

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Whitening":
        """The same on another device and in another dtype."""
        return Whitening(self.root.to(device, dtype), self.inverse.to(device, dtype))


def positive_definite(gram: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """A Gram matrix whose Cholesky factor exists, and the factor (CoSpaDi, appendix A.1).

    The Gram is returned as it is if it can be factorised. Otherwise (fewer tokens than inputs, a text that repeats
    itself) it becomes G + (max(0, −λ_min) + ε · mean λ) I.

    Args:
        gram: G (d_in, d_in), symmetric, positive semi-definite up to rounding, finite.
        epsilon: relative ridge of the second attempt; grown tenfold until the factorisation succeeds.

    Returns:
        the Gram and its lower factor, both (d_in, d_in) float64.
    """
    gram = gram.double()
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return gram, factor
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    values = torch.linalg.eigvalsh(gram)
    mean = float(values.clamp_min(0).mean()) or 1.0
    while True:
        shifted = gram + (max(0.0, -float(values[0])) + epsilon * mean) * eye
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return shifted, factor
        epsilon *= 10


def cholesky_whitening(gram: Tensor, epsilon: float = 1e-6) -> Whitening:
    """Whitening by the upper Cholesky factor, as in CoSpaDi (appendix A.1).

    Args:
        gram: (d_in, d_in) symmetric, positive semi-definite up to rounding.
        epsilon: see :func:`positive_definite`.

    Returns:
        root (upper triangular) and inverse in float64.
    """
    root = positive_definite(gram, epsilon)[1].T.contiguous()
    eye = torch.eye(len(root), dtype=torch.float64, device=root.device)
    return Whitening(root, torch.linalg.solve_triangular(root, eye, upper=True))


def ridge_whitening(gram: Tensor, ridge: float = 1e-4) -> Whitening:
    """Whitening by the Cholesky factor of G + ridge · mean eigenvalue · I.

    The ridge keeps the inverse bounded for rank-deficient Grams. The symmetric root solves the same problem up to a
    rotation, but needs an eigendecomposition: for 14336 inputs most of a minute on a large GPU, against a fraction of a
    second.

    Args:
        gram: (d_in, d_in) symmetric, positive semi-definite up to rounding.
        ridge: added to every eigenvalue, as a share of their mean; at least 1e-9.

    Returns:
        root (upper triangular) and inverse in float64; the identity where the Gram is all zero.
    """
    gram = gram.double()
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    mean = gram.diagonal().mean()
    if mean <= 0:
        return Whitening(eye, eye)
    return cholesky_whitening(gram + max(ridge, 1e-9) * mean * eye)
