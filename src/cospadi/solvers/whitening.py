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


def ridge_whitening(gram: Tensor, ridge: float = 1e-4) -> Whitening:
    """Whitening by the Cholesky factor of G + ridge · mean eigenvalue · I.

    The same problem as :func:`symmetric_whitening` up to a rotation, at a small part of the cost (an eigenproblem of
    14336 inputs takes the better part of a minute on a large GPU, this a fraction of a second). The ridge makes it safe
    for rank-deficient Grams.

    Args:
        gram: (d_in, d_in) symmetric, positive semi-definite up to rounding.
        ridge: added to every eigenvalue, as a share of their mean; not below 1e-9.

    Returns:
        root (upper triangular) and inverse in float64; the identity where the Gram is all zero.
    """
    gram = gram.double()
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    mean = gram.diagonal().mean()
    if mean <= 0:
        return Whitening(eye, eye)
    return cholesky_whitening(gram + max(ridge, 1e-9) * mean * eye)


def cholesky_whitening(gram: Tensor, epsilon: float = 1e-6) -> Whitening:
    """Whitening by the upper Cholesky factor, as CoSpaDi does it (appendix A.1).

    Plain Cholesky first; if it fails, G + (max(0, −λ_min) + ε·mean λ) I.

    Args:
        gram: (d_in, d_in) symmetric.
        epsilon: relative ridge of the second try; grown tenfold until the factorisation holds.

    Returns:
        root (upper triangular) and inverse in float64.
    """
    gram = gram.double()
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        values = torch.linalg.eigvalsh(gram)
        mean = float(values.clamp_min(0).mean()) or 1.0
        while failed:
            factor, failed = torch.linalg.cholesky_ex(gram + (max(0.0, -float(values[0])) + epsilon * mean) * eye)
            epsilon *= 10
    root = factor.T.contiguous()
    return Whitening(root, torch.linalg.solve_triangular(root, eye, upper=True))
