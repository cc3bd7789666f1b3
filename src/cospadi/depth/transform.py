"""Linear transforms T with M T ≈ R: least squares in closed form with several structures, and cosine by Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.depth.normal_equations import NormalEquations
from cospadi.errors import NumericalError
from cospadi.solvers.procrustes import polar_factor

Structure = Literal["full", "diagonal", "orthonormal", "low_rank"]

COSINE_BATCH = 1024
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def least_squares(
    equations: NormalEquations, *, ridge: float = 0.0, structure: Structure = "full", rank: int = 64
) -> Tensor:
    """The transform of least squared error.

    With α = ridge · mean(diag G), G = MᵀM, C = MᵀR (ReplaceMe, arXiv 2505.02819, equation 7, there with α pulling
    towards 0): T = I + (G + αI)⁻¹(C − G). Pulled towards the identity, directions that the text says nothing about
    are left as the removal alone leaves them. Without a ridge, and G singular, it is the solution nearest to I.

    Args:
        equations: of M and R.
        ridge: relative ridge, at least 0; it does not apply to orthonormal transforms.
        structure: ``full``; ``diagonal``: T = diag(t); ``orthonormal``: TᵀT = I, the polar factor of C (Procrustes);
            ``low_rank``: T = I + AB with AB of that rank, by reduced-rank regression.
        rank: of ``low_rank``.

    Returns:
        T, float64 (d, d).

    Raises:
        NumericalError: if M is zero.
    """
    gram, cross = equations.gram, equations.cross
    width = len(gram)
    identity = torch.eye(width, dtype=gram.dtype)
    alpha = ridge * float(gram.diagonal().mean())
    if not float(gram.diagonal().sum()) > 0:
        raise NumericalError("the branch that the transform shall be folded into is zero on this text")
    if structure == "orthonormal":
        return polar_factor(cross)
    if structure == "diagonal":
        power = gram.diagonal() + alpha
        step = torch.where(power > 0, (cross - gram).diagonal() / power.clamp_min(1e-300), 0.0)
        return identity + torch.diag(step)
    values, vectors = equations.spectrum
    values = values + alpha
    usable = values > width * torch.finfo(gram.dtype).eps * values[-1]
    inverse = torch.where(usable, 1 / values.clamp_min(1e-300), 0.0)
    step = vectors @ (inverse[:, None] * (vectors.T @ (cross - gram)))
    if structure == "low_rank" and rank < width:
        # In coordinates where M is white the error of a step is its distance from the full step: truncate there.
        root = values.sqrt() * usable
        left, singular, right = torch.linalg.svd(root[:, None] * (vectors.T @ step), full_matrices=False)
        white = left[:, :rank] * singular[:rank] @ right[:rank]
        step = vectors @ (torch.where(usable, 1 / root.clamp_min(1e-150), 0.0)[:, None] * white)
    transform: Tensor = identity + step
    return transform


def held_out_ridge(
    halves: tuple[NormalEquations, NormalEquations], *, structure: Structure = "full", rank: int = 64
) -> float:
    """The ridge whose transform, solved on one half of the text, has the least squared error on the other half.

    Args:
        halves: of the text, by sequences.
        structure: of the transform.
        rank: of a low-rank one.

    Returns:
        one of `RIDGES`; the larger of equals.
    """

    def missed(ridge: float) -> float:
        pairs = (halves, halves[::-1])
        return sum(b.tokens * b.loss(least_squares(a, ridge=ridge, structure=structure, rank=rank)) for a, b in pairs)

    return min(reversed(RIDGES), key=missed)


def cosine(
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int = 10,
    learning_rate: float = 1e-4,
    diagonal: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The transform of greatest mean cosine, by Adam from the identity (ReplaceMe, simplified objective).

    Minimises the mean over tokens of 1 − cos(m T, r) in batches of 1024 tokens.

    Args:
        inputs: rows of M (tokens, d), any float dtype.
        targets: rows of R, likewise.
        epochs: passes over the rows.
        learning_rate: of Adam.
        diagonal: learn a diagonal T only.
        seed: of the order of rows.
        progress: called as progress(epochs done, epochs).

    Returns:
        T, float64 (d, d) on the CPU.

    Raises:
        NumericalError: if the rows or the transform hold NaN or Inf.
    """
    width, device = inputs.shape[1], inputs.device
    start = torch.ones(width, device=device) if diagonal else torch.eye(width, device=device)
    parameter = start.requires_grad_(True)
    optimiser = torch.optim.Adam([parameter], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=generator).to(device)
        for rows in torch.split(order, COSINE_BATCH):
            m, r = inputs[rows].float(), targets[rows].float()
            with torch.enable_grad():
                moved = m * parameter if diagonal else m @ parameter
                loss = 1 - functional.cosine_similarity(moved, r, dim=-1).mean()
                (parameter.grad,) = torch.autograd.grad(loss, parameter)
            optimiser.step()
        if progress:
            progress(epoch + 1, epochs)
    found = parameter.detach().to("cpu", torch.float64)
    if not bool(found.isfinite().all()):
        raise NumericalError("the cosine objective gave a transform with NaN or Inf; use solver=least_squares")
    return torch.diag(found) if diagonal else found
