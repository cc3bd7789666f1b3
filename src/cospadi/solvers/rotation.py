"""The orthogonal basis in which truncating a signal loses the least energy."""

import torch
from torch import Tensor


def principal_axes(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a second moment, by decreasing energy of the signal along them.

    Keeping the first k axes Q_k loses Σ‖x − x Q_k Q_kᵀ‖², the sum of the remaining eigenvalues; no other k axes lose
    less (PCA; SliceGPT, arXiv 2401.15024, section 3.3). The authors' code adds a multiple of the identity to the
    moment; that shifts the eigenvalues but not the eigenvectors and is omitted here. Signs are fixed, so equal moments
    have equal axes.

    Args:
        moment: Σ xᵀx (d, d), symmetric, any float dtype.

    Returns:
        axes (d, d) float64, orthonormal columns whose entry of largest magnitude is positive; energies (d,) float64,
        non-negative.
    """
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    axes = vectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0), values.flip(0).clamp_min(0)
