"""What each number of shared atoms leaves of a projection, and the search over all of them (MASA, arXiv 2508.04581).

Consecutive layers form groups (`layer_groups`), the matrices of one projection in a group are combined from few shared
atoms (`matrix_pca`), and numbers of atoms and ranks of all layers and projections are chosen together under one byte
budget (`search`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from cospadi.errors import BudgetError, RecipeError
from cospadi.format import GroupShape, SharedSpec
from cospadi.masa.retrofit.layer_groups import group_layers
from cospadi.masa.retrofit.matrix_pca import inner_products, mix, principal_mixtures
from cospadi.masa.retrofit.search import AtomChoice, Projection, allot
from cospadi.solvers.whitening import Whitening, ridge_whitening

TRIED = 9
"""Numbers of atoms that are tried for a family, spread evenly from none to one for every layer."""
LAYERS = 12
"""Layers of a group on average, where nothing says how many groups there are. Larger groups give lower errors (one
group of 9 layers lower than 2 or 4), but the work of the search grows with their square."""
RIDGE = 1e-6
"""Added to every Gram, as a share of its mean eigenvalue; that of `svd_llm`."""


class MasaOptions(BaseModel):
    """What a user may say about the method."""

    model_config = ConfigDict(extra="forbid")

    groups: int | None = Field(None, ge=1, description="Number of groups; left out: about one for 12 layers.")
    threshold: float | None = Field(None, ge=0, description="A group ends where the logit-lens divergence is larger.")
    atoms: int | None = Field(None, ge=0, description="Shared atoms of every group and projection; left out: searched.")
    least_atoms: int = Field(0, ge=0, description="Fewest atoms that the search tries.")
    relative: bool = Field(True, description="Count errors relative to each layer's own output energy.")

    @field_validator("threshold")
    @classmethod
    def _one_rule(cls, threshold: float | None, info: ValidationInfo) -> float | None:
        if threshold is not None and info.data.get("groups") is not None:
            raise ValueError("groups says already where groups end: give one of the two")
        return threshold

    def layer_groups(self, distances: Tensor) -> list[range]:
        """The groups of consecutive layers; without a rule as few as have at most `LAYERS` layers on average."""
        if self.threshold is not None:
            return group_layers(distances, threshold=self.threshold)
        return group_layers(distances, groups=self.groups or ceil((len(distances) + 1) / LAYERS))


Layers = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Weights W_l (d_in, d_out) of some layers, and the Gram (d_in, d_in) float64 of each one's input."""


def check_atoms(atoms: int, modules: Sequence[str]) -> None:
    """Refuse more atoms than matrices.

    Raises:
        RecipeError: naming the group.
    """
    if atoms > len(modules):
        raise RecipeError(
            f"{atoms} atoms for the {len(modules)} layers of {modules[0]} … {modules[-1]} are more than there are "
            "matrices: give fewer atoms, or fewer groups"
        )


def split_projection(shape: GroupShape, layer_of: Callable[[str], int], groups: Sequence[range]) -> list[GroupShape]:
    """One shape for every group of layers in which the projection occurs."""
    found = []
    for layers in groups:
        names = tuple(name for name in shape.modules if layer_of(name) in layers)
        if names:
            found.append(GroupShape(names, shape.d_in, shape.d_out[: len(names)]))
    return found


def choices_of(
    weights: Sequence[Tensor], grams: Sequence[Tensor], names: Sequence[str], options: MasaOptions
) -> Projection:
    """What each number of atoms leaves of one projection in one group of layers.

    For every S, the S principal atoms of the matrices, coefficients of each layer by least squares under its own Gram
    (where the Gram is the identity they are tr(A_sᵀ W_l)), and the whitened spectrum of what they miss. All of it is
    computed from mixtures of the matrices; no atom is formed. With S = L nothing is missed.

    Args:
        weights: W_l (d_in, d_out), on one device.
        grams: XᵀX / tokens of each, (d_in, d_in) float64.
        names: of the modules.
        options: of the method.

    Raises:
        RecipeError: if more atoms are asked for than there are layers.
    """
    count, (d_in, d_out) = len(weights), weights[0].shape
    roots = [ridge_whitening(gram, RIDGE) for gram in grams]
    products = [inner_products(weights, gram_under(root)) for root in roots]
    mixtures = principal_mixtures(inner_products(weights))
    choices = []
    for atoms in _tried(count, mixtures.shape[1], names, options):
        if atoms == count:
            choices.append(AtomChoice(atoms, 2 * count * d_in * d_out, (np.zeros(0),) * count))
            continue
        gains = []
        for layer, root in enumerate(roots):
            left = _left_over(mixtures[:, :atoms], products[layer], layer)
            energy = float(products[layer][layer, layer]) if options.relative else 1.0
            squares = squared_spectrum(root.apply(mix(weights, left)))
            gains.append((squares / energy if energy > 0 else squares).cpu().numpy())
        choices.append(AtomChoice(atoms, 2 * atoms * (d_in * d_out + count), tuple(gains)))
    return Projection(2 * (d_in + d_out), tuple(choices))


def _tried(count: int, independent: int, names: Sequence[str], options: MasaOptions) -> list[int]:
    """Numbers of atoms to try: up to that of linearly independent matrices, and one for every layer."""
    for asked in (options.atoms, options.least_atoms):
        if asked is not None:
            check_atoms(asked, names)
    if options.atoms is not None:
        return [options.atoms if options.atoms == count else min(options.atoms, independent)]
    least = min(options.least_atoms, independent)
    steps = max(1, min(TRIED, independent - least + 1) - 1)
    return sorted({round(least + (independent - least) * step / steps) for step in range(steps + 1)} | {count})


def gram_under(root: Whitening) -> Tensor:
    """The Gram, ridge included, of which a whitening is the root."""
    gram: Tensor = root.root.T @ root.root
    return gram


def _left_over(mixtures: Tensor, products: Tensor, layer: int) -> Tensor:
    """Weights of the matrices in what the atoms miss of one of them: e_l − T c with c by least squares."""
    left = torch.zeros(len(products), dtype=torch.float64, device=products.device)
    left[layer] = 1.0
    if mixtures.shape[1] == 0:
        return left
    normal = mixtures.T @ products @ mixtures
    coefficients: Tensor = torch.linalg.pinv(normal, hermitian=True) @ (mixtures.T @ products[:, layer])
    return left - mixtures @ coefficients


def squared_spectrum(matrix: Tensor) -> Tensor:
    """Squared singular values of a matrix (m, n), float64, largest first, by its smaller Gram."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return squares


def search(
    shapes: Sequence[GroupShape],
    layer_of: Callable[[str], int],
    distances: Tensor,
    layers: Callable[[GroupShape], Layers],
    budget: int,
    options: MasaOptions,
    progress: Callable[[int, int, str], None],
) -> list[SharedSpec]:
    """Groups, numbers of atoms and ranks of least total whitened error within the budget.

    Args:
        shapes: all projections, of :func:`projections`.
        layer_of: the decoder layer of a module.
        distances: between consecutive layers, of :func:`~cospadi.masa.retrofit.layer_groups.divergences`.
        layers: weights and Grams of some modules, on the device to compute on.
        budget: bytes for all together.
        options: of the method.
        progress: called as progress(done, total, name).

    Returns:
        one spec for every projection of every group, projection by projection.

    Raises:
        BudgetError: if even the smallest choices take more (names the least possible).
        RecipeError: if the groups, or the atoms of one of them, are not possible.
    """
    groups = options.layer_groups(distances)
    parts = [part for shape in shapes for part in split_projection(shape, layer_of, groups)]
    found = []
    for number, part in enumerate(parts):
        progress(number, len(parts), part.modules[0])
        found.append(choices_of(*layers(part), part.modules, options))
    progress(len(parts), len(parts), "")
    try:
        allotted = allot(found, budget)
    except BudgetError as error:
        before = sum(shape.dense_bytes for shape in shapes)
        raise BudgetError(f"method 'masa' on these {before:,} bytes of layers: {error}") from None
    return [
        SharedSpec(part.modules, part.d_in, part.d_out[0], share.atoms, share.ranks)
        for part, share in zip(parts, allotted, strict=True)
    ]
