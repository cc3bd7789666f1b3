"""Solve M T ≈ R for a linear transform T: least squares in closed form, and cosine similarity by Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.errors import NumericalError
from cospadi.pruning.depth.replaceme.normal_equations import NormalEquations
from cospadi.solvers.procrustes import polar_factor

Structure = Literal["full", "diagonal", "orthonormal", "low_rank"]

COSINE_BATCH = 1024
RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def least_squares(
    equations: NormalEquations, *, ridge: float = 0.0, structure: Structure = "full", rank: int = 64
) -> Tensor:
    """The transform with the least squared error.

    T = I + (G + αI)⁻¹(C − G) with G = MᵀM, C = MᵀR and α = ridge · mean(diag G). ReplaceMe (arXiv 2505.02819,
    equation 7) pulls T towards zero; here α pulls it towards the identity, so that plain removal remains in directions
    that the text does not cover. Without a ridge, a singular G yields the solution nearest to I.

    Args:
        equations: of M and R.
        ridge: relative ridge, at least 0.
        structure: ``full``; ``diagonal``: T = diag(t); ``orthonormal``: TᵀT = I, the polar factor of C + αI
            (Procrustes); ``low_rank``: T = I + AB with AB of that rank, by reduced-rank regression.
        rank: of ``low_rank``.

    Returns:
        T, float64 (d, d), on the CPU.

    Raises:
        NumericalError: if M is zero.
    """
    gram, cross = equations.gram, equations.cross
    width = len(gram)
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    _require_rows(equations)
    if structure == "orthonormal":
        if ridge > 0:  # min ‖M T − R‖² + α‖T − I‖² over rotations is max tr(Tᵀ(C + αI))
            return polar_factor((cross + ridge * gram.diagonal().mean() * identity).cpu(), rank=width)
        return polar_factor(cross.cpu(), rank=equations.tokens)  # of fewer rows than columns the rest is rounding
    if structure == "diagonal":
        power = gram.diagonal() + ridge * gram.diagonal().mean()
        step = torch.where(power > 0, (cross - gram).diagonal() / power.clamp_min(1e-300), 0.0)
        return (identity + torch.diag(step)).cpu()
    if structure == "full" or rank >= width:
        return (identity + _solved(equations, cross - gram, ridge)).cpu()
    values, vectors, inverse = _damped(equations, ridge)
    # In coordinates where M is white the error of a step is its distance from the full step: truncate there.
    root = (values * (inverse > 0)).sqrt()
    white = root[:, None] * inverse[:, None] * (vectors.T @ (cross - gram))
    left, singular, right = torch.linalg.svd(white, full_matrices=False)
    back = torch.where(inverse > 0, 1 / root.clamp_min(1e-150), 0.0)
    step = vectors @ (back[:, None] * (left[:, :rank] * singular[:rank] @ right[:rank]))
    transform: Tensor = (identity + step).cpu()
    return transform


def correction(equations: NormalEquations, *, ridge: float = 0.0) -> Tensor:
    """The step D with the least squared error: min ‖A D − R‖² + α‖D‖² with α = ridge · mean(diag AᵀA).

    With the inputs A of a linear layer W and the error R of its output, W + D is the layer refitted, pulled towards W.
    Without a ridge, a singular AᵀA yields the smallest such step.

    Args:
        equations: of A (tokens, p) and R (tokens, d).
        ridge: relative ridge, at least 0.

    Returns:
        D, float64 (p, d), on the CPU.

    Raises:
        NumericalError: if A is zero.
    """
    _require_rows(equations)
    return _solved(equations, equations.cross, ridge).cpu()


def _require_rows(equations: NormalEquations) -> None:
    if not float(equations.gram.diagonal().sum()) > 0:
        raise NumericalError("the activations that the transform would be fitted on are all zero on this text")


def _solved(equations: NormalEquations, right: Tensor, ridge: float) -> Tensor:
    """(G + αI)⁻¹ right; the minimum-norm solution of a singular system."""
    gram = equations.gram
    if ridge > 0:  # by Cholesky: an eigendecomposition takes about thirty times as long
        shift = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + shift)
        if not int(failed):
            return torch.cholesky_solve(right, factor)
    _, vectors, inverse = _damped(equations, ridge)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def _damped(equations: NormalEquations, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of G + αI, eigenvectors, and the inverse eigenvalues (0 for those that are numerically zero)."""
    gram, (values, vectors) = equations.gram, equations.spectrum
    values = values + ridge * gram.diagonal().mean()
    usable = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1]
    return values, vectors, torch.where(usable, 1 / values.clamp_min(1e-300), 0.0)


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
    """The transform with the highest mean cosine similarity, by Adam from the identity.

    Minimises the mean over tokens of 1 − cos(m T, r), ReplaceMe's simplified objective, in batches of 1024 tokens.

    Args:
        inputs: rows of M (tokens, d), any float dtype.
        targets: rows of R (tokens, d), any float dtype.
        epochs: passes over the rows.
        learning_rate: of Adam.
        diagonal: restrict T to diagonal matrices.
        seed: for the order of the rows.
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
        raise NumericalError("the cosine solver diverged to a transform with NaN or Inf: use solver=least_squares")
    return torch.diag(found) if diagonal else found
