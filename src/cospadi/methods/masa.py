"""MASA for a trained model without retraining: shared matrix atoms and whitened low rank (arXiv 2508.04581).

    W_l ≈ Σ_s c_ls A_s + U_l V_l

The matrices of one projection in a group of consecutive layers are combined from few shared atoms A_s, and what these
miss of a layer is kept at low rank where its inputs make it matter. Groups, numbers of atoms and ranks of all
projections are chosen together under one byte budget: allocation ``atoms``, see `cospadi.masa.retrofit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.errors import RecipeError
from cospadi.format import GroupShape, SharedFactors, SharedSpec
from cospadi.masa.retrofit.atoms import RIDGE, MasaOptions, check_atoms, gram_under
from cospadi.masa.retrofit.matrix_pca import inner_products, mix, principal_mixtures
from cospadi.methods.base import Problem, method
from cospadi.solvers.low_rank import unit_variance, whitened
from cospadi.solvers.whitening import ridge_whitening


def masa_plan(shape: GroupShape, budget: int, *, atoms: int | None = None, groups: int | None = None) -> SharedSpec:
    """What shapes alone suggest: as many atoms as fit, and the same rank for every layer from what is left.

    Raises:
        RecipeError: if more atoms, or more groups of layers, are asked for than there are layers.
    """
    layers, d_in, d_out = len(shape.modules), shape.d_in, shape.d_out[0]
    if groups is not None and groups > layers:
        raise RecipeError(f"groups: {groups} groups of {layers} layers are not possible: give 1 to {layers}")
    if atoms is not None:
        check_atoms(atoms, shape.modules)
    each, rank_bytes = 2 * (d_in * d_out + layers), 2 * (d_in + d_out)
    if atoms == layers or (atoms is None and budget >= shape.dense_bytes):
        return SharedSpec(shape.modules, d_in, d_out, layers, (0,) * layers)
    count = min(layers - 1, budget // each) if atoms is None else atoms
    rank = min((budget - count * each) // (rank_bytes * layers), d_in, d_out)
    return SharedSpec(shape.modules, d_in, d_out, count, (max(rank, 0 if count else 1),) * layers)


def masa_memory(spec: SharedSpec) -> float:
    """Bytes that the search holds: the matrices, their Grams and the roots of these, in float64."""
    return 8.0 * len(spec.modules) * (2 * spec.d_in * spec.d_out + 4 * spec.d_in**2)


@method(
    "masa",
    paper="arXiv 2508.04581",
    plan=masa_plan,
    grouping="projection",
    allocation="atoms",
    spec=SharedSpec,
    options=MasaOptions,
    covers="attention",
    decides=("grouping", "allocation", "sequential", "anchor", "refine"),
    memory=masa_memory,
)
def masa(problem: Problem, spec: SharedSpec) -> SharedFactors:
    """Attention matrices of all layers as combinations of shared matrix atoms, plus whitened low rank of each.

    Every step takes what the one before it really stores: coefficients are fitted to the rounded atoms, the low-rank
    part to what rounded atoms and coefficients miss.

    Args:
        problem: weights and Grams of the group's layers.
        spec: numbers of atoms and ranks.

    Returns:
        the factors, in `problem.dtype`.
    """
    dtype = problem.dtype
    weights = [weight.double() for weight in problem.weights]
    d_in, d_out = weights[0].shape
    if spec.whole:
        empty = tuple(weight[:0].to(dtype) for weight in weights)
        kept = torch.stack([weight.T.to(dtype) for weight in weights])
        return SharedFactors(kept, torch.eye(len(weights), dtype=dtype), empty, empty)
    scale = (d_in * d_out) ** 0.5  # entries of unit variance: nothing of them is lost in float16
    mixtures = principal_mixtures(inner_products(weights), spec.atoms)
    atoms = torch.zeros(spec.atoms, d_in, d_out, dtype=dtype, device=weights[0].device)
    for number, column in enumerate(mixtures.T):  # fewer than S where the matrices are linearly dependent
        atoms[number] = (scale * mix(weights, column)).to(dtype)
    coefficients, down, up = [], [], []
    for index, weight in enumerate(weights):
        root = ridge_whitening(problem.gram_of(index), RIDGE)
        shares = _shares(atoms, weight, gram_under(root)).to(dtype)
        coefficients.append(shares)
        left = weight - torch.tensordot(shares.double(), atoms.double(), 1)
        rank = spec.ranks[index]
        dictionary, codes = left[:, :0], left[:0]
        if rank:
            dictionary, codes = unit_variance(*whitened(left, root, rank), problem.gram_of(index))
        down.append(dictionary.T.to(dtype))
        up.append(codes.T.to(dtype))
    return SharedFactors(atoms.transpose(1, 2), torch.stack(coefficients), tuple(down), tuple(up))


def _shares(atoms: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """Coefficients (S,) float64 by least squares under the layer's own Gram; atoms of zeros get none."""
    if not len(atoms):
        return torch.zeros(0, dtype=torch.float64, device=weight.device)
    products = inner_products([*atoms, weight], gram)
    shares: Tensor = torch.linalg.pinv(products[:-1, :-1], hermitian=True) @ products[:-1, -1]
    return shares
