"""ROCKET: one pass of eigenbasis, importance, sparsification and refit (arXiv 2602.11008)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cospadi.format import Factors, GroupSpec
from cospadi.format.patterns import keep_largest
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods._whitened import complete_dictionary_plan, stored
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import CHOOSING, Sizes, Work, eigen, numbers, product, whitening
from cospadi.methods.ranges import Natural, NonNegative, Positive
from cospadi.solvers.mod import least_squares_dictionary, unit_atoms
from cospadi.solvers.procrustes import leading_directions
from cospadi.solvers.whitening import Whitening, cholesky_whitening


def adam_refined(
    weight: Tensor, whitening: Whitening, dictionary: Tensor, codes: Tensor, *, steps: int, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """Minimise ‖L (W − U V)‖² / ‖L W‖² over both factors by Adam, with a fixed support and closed-form gradients.

    Args:
        weight: W (d, n).
        whitening: of L.
        dictionary: U (d, k), unwhitened.
        codes: V (k, n); zeros stay zeros.
        steps: of Adam.
        learning_rate: of Adam.

    Returns:
        the initial or the final factors, whichever have the smaller ‖W − U V‖, as in the authors' code.
    """
    mask = (codes != 0).to(codes.dtype)
    factors = [dictionary.clone(), codes.clone()]
    adam = torch.optim.Adam(factors, lr=learning_rate)
    metric = (whitening.root.T @ whitening.root).to(weight.dtype)
    scale = 2 / whitening.apply(weight).square().sum().clamp_min(torch.finfo(weight.dtype).tiny)
    for _ in range(steps):
        u, v = factors
        error = scale * (metric @ (u @ v - weight))
        u.grad, v.grad = error @ v.T, (u.T @ error) * mask
        adam.step()
    before, after = ((weight - u @ v).square().sum() for u, v in ((dictionary, codes), factors))
    return (factors[0], factors[1]) if bool(after < before) else (dictionary, codes)


def rocket_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """One eigendecomposition, then Adam on both factors."""
    z = Sizes.of(spec)
    (steps,) = numbers(options, "refine_steps")
    refit = 3 * product(z.d, z.n, z.k) + product(z.n, z.k, z.k) + Work(moved=CHOOSING * z.n * z.k)
    adam = 3 * product(z.d, z.n, z.k) + product(z.d, z.d, z.n) + Work(moved=60.0 * (z.n + z.d) * z.k, kernels=40)
    return whitening(z) + product(z.d, z.d, z.n, wide=True) + eigen(z.d) + refit + adam * steps


@method(
    "rocket",
    paper="ROCKET, arXiv 2602.11008",
    plan=complete_dictionary_plan,
    grouping="matrix",
    cost=rocket_cost,
    allocation="rocket",
)
def rocket(
    problem: Problem,
    spec: GroupSpec,
    *,
    importance_power: NonNegative = 0.5,
    ridge: NonNegative = 1e-3,
    refine_steps: Natural = 0,
    learning_rate: Positive = 1e-3,
) -> Factors:
    """Eigenbasis of the whitened weights, codes thresholded by importance, dictionary refitted once.

    B holds the leading eigenvectors of Y Yᵀ for Y = L W, and C = BᵀY. The importance of an entry is |c_ij|·‖L⁻¹b_i‖^λ:
    its whitened magnitude, scaled by the norm of the atom in the weight's own space.

    There are two departures from the paper, both smaller than its over-sparsification of half a per cent. The paper
    prunes each column slightly too far and returns the difference to the most important entries of the whole matrix, so
    that columns differ by a few non-zeros. Here each column must hold exactly `spec.codes.nonzeros`, which amounts to
    one threshold per column. The bytes of the mask are counted, which the paper omits.

    The paper's allocation across layers is in `cospadi.allocation`.

    Args:
        problem: weights and Grams; several weights are solved side by side under the mean Gram.
        spec: atoms and non-zeros.
        importance_power: λ.
        ridge: μ of the refit, as a share of the mean diagonal entry of C Cᵀ.
        refine_steps: Adam steps on both factors afterwards; the paper has none, the authors' code 100.
        learning_rate: of these steps.

    Returns:
        the factors; `info` has the relative squared error in whitened space.
    """
    weight = stacked(problem)
    whitening = cholesky_whitening(mean_gram(problem))
    target = whitening.apply(weight)
    basis = leading_directions(target, spec.atoms)
    dense = basis.T @ target
    size = torch.linalg.vector_norm(whitening.undo(basis), dim=0)
    importance = dense.abs() * size.unsqueeze(1) ** importance_power
    codes = dense * keep_largest(importance, spec.codes.nonzeros)
    dictionary = whitening.undo(least_squares_dictionary(target, codes, ridge=ridge, fallback=basis))
    if refine_steps:
        dictionary, codes = adam_refined(
            weight, whitening, dictionary, codes, steps=refine_steps, learning_rate=learning_rate
        )
    whitened = whitening.apply(dictionary)
    error = float((target - whitened @ codes).square().sum())
    dictionary, codes = unit_atoms(dictionary, codes, torch.linalg.vector_norm(whitened, dim=0))
    return stored(dictionary, codes, [error], float(target.square().sum()))
