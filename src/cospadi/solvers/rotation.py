"""The orthogonal basis in which a signal may be cut with the least loss."""

import torch
from torch import Tensor


def principal_axes(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a second moment, in falling order of the signal's energy along them.

    Keeping the first k axes Q_k loses Σ‖x − x Q_k Q_kᵀ‖² = the sum of the other eigenvalues, the least of all k (PCA;
    SliceGPT, arXiv 2401.15024, section 3.3). Adding a multiple of the identity to the moment, as the authors' code
    does, moves the eigenvalues and leaves the eigenvectors; it is left out. Signs are fixed, so that equal moments
    give equal axes.

    Args:
        moment: Σ xᵀx (d, d), symmetric, any float dtype.

    Returns:
        axes (d, d) float64 in columns, orthonormal, the largest entry of each positive; energies (d,) float64, not
        negative.
    """
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    axes = vectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0), values.flip(0).clamp_min(0)
