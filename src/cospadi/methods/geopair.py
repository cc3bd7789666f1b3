"""GeoPair: one dictionary for two weights, each under the Gram of its own inputs (arXiv 2609.25963)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cospadi.format import Factors, GroupShape, GroupSpec
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods._whitened import stored
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Sizes, Work, eigen, numbers, product
from cospadi.methods.ranges import AtomsPerNonzero, Below1, Count, Natural, NonNegative
from cospadi.methods.sizing import sparse_dictionary_plan
from cospadi.solvers.htp import dense_codes, htp
from cospadi.solvers.ksvd import random_atoms
from cospadi.solvers.mod import least_squares_dictionary, unit_atoms
from cospadi.solvers.procrustes import leading_directions
from cospadi.solvers.sylvester import Pencil, diagonalise, shared_update, sylvester_update
from cospadi.solvers.whitening import positive_definite

Part = tuple[Tensor, Tensor]  # W_i and G_i


def geopair_plan(shape: GroupShape, budget: int, *, rho: AtomsPerNonzero = 2.5) -> GroupSpec:
    """16-bit dictionary and values, one mask bit per code, k atoms and s = k/rho non-zeros per column."""
    return sparse_dictionary_plan(shape, budget, rho=rho)


def _parts(problem: Problem, ridge: float) -> list[Part]:
    """Weights and their positive definite Grams G + ηI, η a share of the mean diagonal; siblings count as one."""
    weights = [stacked(problem)] if len(problem.grams) == 1 else list(problem.weights)
    parts = []
    for weight, gram in zip(weights, problem.grams, strict=True):
        level = ridge * float(gram.diagonal().mean()) or 1.0
        ridged = gram.double() + level * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        parts.append((weight, positive_definite(ridged)[0]))
    return parts


def _energy(part: Part) -> float:
    """Squared output energy tr(WᵀGW) of one weight."""
    weight, gram = part[0].double(), part[1]
    return float((weight * (gram @ weight)).sum())


def _initial(weights: Tensor, atoms: int, seed: int) -> Tensor:
    """Leading left singular vectors of the unwhitened weights, then random columns; (d_in, atoms) float64."""
    weights = weights.double()
    leading = leading_directions(weights, min(atoms, weights.shape[0]))
    if atoms == leading.shape[1]:
        return leading
    return torch.cat([leading, random_atoms(weights, atoms - leading.shape[1], seed)], dim=1)


def _dictionary(
    parts: Sequence[Part], codes: Sequence[Tensor], old: Tensor, metrics: Pencil | None, ridge: float
) -> Tensor:
    """The best dictionary (d_in, k) float64 for given codes, in closed form for one or two Grams."""
    if len(parts) == 1:  # the Gram cancels out
        return least_squares_dictionary(parts[0][0].double(), codes[0], ridge=ridge, fallback=old)
    moments, right = [], torch.zeros_like(old)
    for (weight, gram), code in zip(parts, codes, strict=True):
        wide = code.double()
        moment = wide @ wide.T
        level = ridge * float(moment.diagonal().mean()) or 1.0
        moments.append(moment + level * torch.eye(len(moment), dtype=torch.float64, device=moment.device))
        right += gram @ (weight.double() @ wide.T)
    if metrics is None:
        new = shared_update([gram for _, gram in parts], moments, right, old)
    else:
        new = sylvester_update(metrics, diagonalise(*moments), right)
    used = torch.stack([(code != 0).any(1) for code in codes]).any(0)
    return torch.where(used, new, old)


def _codes(
    part: Part, dictionary: Tensor, codes: Tensor | None, nonzeros: int, ridge: float, options: dict[str, float]
) -> tuple[Tensor, float]:
    """Codes of one weight by hard-thresholding pursuit from `codes` (None: dense codes), and their squared error."""
    weight, gram = part
    wide = weight.double()
    image = gram @ dictionary
    inner, products = dictionary.T @ image, image.T @ wide
    level = ridge * float(inner.diagonal().mean()) or 1.0
    inner += level * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    if codes is None:
        codes = dense_codes(inner, products).to(weight.dtype)
    codes = htp(inner.to(weight.dtype), products.to(weight.dtype), codes, nonzeros, **options)  # type: ignore[arg-type]
    error = wide - dictionary @ codes.double()
    return codes, float((error * (gram @ error)).sum())


def geopair_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Hard-thresholding pursuit and Sylvester updates."""
    z = Sizes.of(spec)
    rounds, steps, iterations = numbers(options, "rounds", "htp_steps", "cg_iterations")
    inside = steps * (1 + iterations)
    code = (product(z.k, z.k, z.n) + Work(moved=60.0 * z.n * z.k, kernels=12)) * inside
    code = code + product(z.d, z.d, z.k, wide=True) + 3 * product(z.d, z.k, z.n, wide=True)
    update = 2 * product(z.n, z.k, z.k, wide=True) + 2 * eigen(z.k) + 4 * product(z.d, z.d, z.k, wide=True)
    return 2 * eigen(z.d) + (code + update + product(z.d, z.d, z.n, wide=True)) * (1 + rounds)


@method("geopair", paper="GeoPair, arXiv 2609.25963", plan=geopair_plan, grouping="pairs", cost=geopair_cost)
def geopair(
    problem: Problem,
    spec: GroupSpec,
    *,
    rounds: Natural = 20,
    htp_steps: Count = 2,
    cg_iterations: Natural = 10,
    cg_tolerance: Below1 = 1e-5,
    ridge: NonNegative = 1e-6,
    relative: bool = False,
) -> Factors:
    """One dictionary under several Grams: codes by hard-thresholding pursuit, dictionary by a Sylvester equation.

    Starts from the singular vectors of the unwhitened weights side by side and their dense codes. The dictionary update
    is exact for one and two Grams. For more, which the paper leaves open, the same equation is solved by conjugate
    gradients.

    Args:
        problem: weights and Grams.
        spec: atoms and non-zeros.
        rounds: of codes and dictionary; the paper does not state its number.
        htp_steps: steps of hard-thresholding pursuit per round.
        cg_iterations: conjugate-gradient steps of each least-squares problem.
        cg_tolerance: relative residual at which they stop.
        ridge: added to the Grams, to DᵀGD and to the codes' moments, as a share of their mean diagonal.
        relative: every weight counts by its error relative to its own output energy. The published objective adds
            plain errors, so that of a pair with unequal energies the weaker weight is hardly fitted at all.

    Returns:
        the factors; `info` has the relative squared output errors of the first and the last codes.
    """
    parts = _parts(problem, ridge)
    units = [_energy(part) ** 0.5 or 1.0 if relative else 1.0 for part in parts]
    parts = [(weight / unit, gram) for (weight, gram), unit in zip(parts, units, strict=True)]
    metrics = diagonalise(parts[0][1], parts[1][1]) if len(parts) == 2 else None
    pursuit = {"steps": htp_steps, "iterations": cg_iterations, "tolerance": cg_tolerance}
    dictionary = _initial(torch.cat([weight for weight, _ in parts], 1), spec.atoms, problem.seed)
    codes: list[Tensor] = []
    losses: list[float] = []
    for number in range(rounds + 1):
        if number:
            dictionary = _dictionary(parts, codes, dictionary, metrics, ridge)
            norms = torch.linalg.vector_norm(dictionary, dim=0)
            codes = [unit_atoms(dictionary, c, norms.to(c.dtype))[1] for c in codes]
            dictionary = dictionary / torch.where(norms > 0, norms, 1.0)
        coded = [
            _codes(part, dictionary, codes[i] if number else None, spec.codes.nonzeros, ridge, pursuit)
            for i, part in enumerate(parts)
        ]
        codes = [code for code, _ in coded]
        losses.append(sum(error for _, error in coded))
    scale = sum(map(_energy, parts))
    codes = [code * unit for code, unit in zip(codes, units, strict=True)]
    # Coordinates get unit variance on calibration text, as with every dictionary of the format.
    energy = (dictionary * (mean_gram(problem) @ dictionary)).sum(0)
    dictionary, joined = unit_atoms(dictionary, torch.cat(codes, dim=1).double(), energy.clamp_min(0).sqrt())
    return stored(dictionary.to(codes[0].dtype), joined.to(codes[0].dtype), losses, scale)
