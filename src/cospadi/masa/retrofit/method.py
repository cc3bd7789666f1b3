"""MASA for a trained model without retraining: shared matrix atoms and whitened low rank (arXiv 2508.04581).

Consecutive layers form groups (`grouping`), the matrices of one projection in a group are combined from few shared
atoms (`matrix_pca`), and what these miss of a layer is kept at low rank where its inputs make it matter. Numbers of
atoms and ranks of all layers and projections are chosen together under one byte budget (`retrofit_search`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from cospadi.errors import BudgetError, ModelError, NumericalError, RecipeError
from cospadi.layers.shared_linear import METHOD, SharedSpec
from cospadi.masa.retrofit.layer_groups import group_layers
from cospadi.masa.retrofit.matrix_pca import inner_products, mix, principal_mixtures
from cospadi.masa.retrofit.search import AtomChoice, Family, allot
from cospadi.methods import GroupShape, Method, Problem
from cospadi.methods.base import add_method
from cospadi.model_view import ModelView
from cospadi.progress import PhaseProgress
from cospadi.solvers.low_rank import unit_variance, whitened
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


@dataclass(frozen=True)
class SharedFactors:
    """What a solve gives: numbers as they are stored, already rounded.

    Attributes:
        atoms: (S, d_out, d_in); with S = L the matrices of the layers themselves.
        coefficients: (L, S).
        down: of each layer (r_l, d_in).
        up: of each layer (d_out, r_l).
    """

    atoms: Tensor
    coefficients: Tensor
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def tensors(self) -> dict[str, Tensor]:
        """By ``"{index}.{parameter}"``, as the layers hold them; those of size zero are left out."""
        if len(self.atoms) == len(self.down):
            return {f"{index}.matrix": matrix.contiguous() for index, matrix in enumerate(self.atoms)}
        found = {"0.atoms": self.atoms}
        for index, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            found |= {f"{index}.coefficients": self.coefficients[index], f"{index}.down": down, f"{index}.up": up}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor.numel()}


def attention_modules(view: ModelView) -> tuple[str, ...]:
    """Names of the linear layers inside attention: below a module whose forward takes an attention mask.

    Raises:
        ModelError: if there are none.
    """
    found = tuple(name for name in view.module_names if _inside_attention(view, name))
    if not found:
        raise ModelError(
            f"{type(view.model).__name__}: found no linear layers inside attention; name the layers with --only"
        )
    return found


def _inside_attention(view: ModelView, name: str) -> bool:
    parts = name.removeprefix(f"{view.layers_name}.").split(".")
    for end in range(2, len(parts)):  # from the first child of the decoder layer down to the linear layer's parent
        parent = view.module(f"{view.layers_name}.{'.'.join(parts[:end])}")
        if "attention_mask" in inspect.signature(type(parent).forward).parameters:
            return True
    return False


def projections(view: ModelView, modules: Sequence[str]) -> list[GroupShape]:
    """The chosen linear layers by what they are: the same name in every decoder layer, and the same shape.

    Args:
        view: of the model.
        modules: names of linear layers.

    Returns:
        one shape for every kind, with the modules in the order of their layers; layers of another shape are a kind of
        their own.
    """
    wanted, kinds = set(modules), dict[tuple[str, int, int], list[str]]()
    for group in view.groups:
        for name, d_out in zip(group.modules, group.d_out, strict=True):
            if name in wanted:
                path = name.removeprefix(f"{view.layers_name}.{group.layer}.")
                kinds.setdefault((path, group.d_in, d_out), []).append(name)
    return [GroupShape(tuple(names), d_in, (d_out,) * len(names)) for (_, d_in, d_out), names in kinds.items()]


def masa_plan(shape: GroupShape, budget: int, *, atoms: int | None = None) -> SharedSpec:
    """What shapes alone suggest: as many atoms as fit, and the same rank for every layer from what is left.

    Raises:
        RecipeError: if more atoms are asked for than there are layers.
    """
    layers, d_in, d_out = len(shape.modules), shape.d_in, shape.d_out[0]
    if atoms is not None:
        check_atoms(atoms, shape.modules)
    each, rank_bytes = 2 * (d_in * d_out + layers), 2 * (d_in + d_out)
    if atoms == layers or (atoms is None and budget >= shape.dense_bytes):
        return SharedSpec(shape.modules, d_in, d_out, layers, (0,) * layers)
    count = min(layers - 1, budget // each) if atoms is None else atoms
    rank = min((budget - count * each) // (rank_bytes * layers), d_in, d_out)
    return SharedSpec(shape.modules, d_in, d_out, count, (max(rank, 0 if count else 1),) * layers)


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


def family_of(weights: Sequence[Tensor], grams: Sequence[Tensor], names: Sequence[str], options: MasaOptions) -> Family:
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
    products = [inner_products(weights, _gram(root)) for root in roots]
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
    return Family(2 * (d_in + d_out), tuple(choices))


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


def _gram(root: Whitening) -> Tensor:
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
    problem_of: Callable[[GroupShape], Problem],
    budget: int,
    options: MasaOptions,
    progress: PhaseProgress,
) -> list[SharedSpec]:
    """Groups, numbers of atoms and ranks of least total whitened error within the budget.

    Args:
        shapes: all projections, of :func:`projections`.
        layer_of: the decoder layer of a module.
        distances: between consecutive layers, of :func:`~cospadi.masa.retrofit.layer_groups.divergences`.
        problem_of: weights and Grams of some modules, on the device to compute on.
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
    families = []
    for number, part in enumerate(parts):
        progress(number, len(parts), part.modules[0])
        problem = problem_of(part)
        families.append(family_of(problem.weights, problem.grams, part.modules, options))
    progress(len(parts), len(parts), "")
    try:
        allotted = allot(families, budget)
    except BudgetError as error:
        before = sum(shape.dense_bytes for shape in shapes)
        raise BudgetError(f"method {METHOD!r} on these {before:,} bytes of layers: {error}") from None
    return [
        SharedSpec(part.modules, part.d_in, part.d_out[0], found.atoms, found.ranks)
        for part, found in zip(parts, allotted, strict=True)
    ]


def masa(problem: Problem, spec: SharedSpec, *, dtype: torch.dtype = torch.bfloat16) -> SharedFactors:
    """Attention matrices of all layers as combinations of shared matrix atoms, plus whitened low rank of each.

    Every step takes what the one before it really stores: coefficients are fitted to the rounded atoms, the low-rank
    part to what rounded atoms and coefficients miss.

    Args:
        problem: weights and Grams of the group's layers.
        spec: numbers of atoms and ranks.
        dtype: 16-bit float in which all is stored.

    Returns:
        the factors, in `dtype`.

    Raises:
        NumericalError: if a factor is NaN or Inf.
    """
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
        shares = _shares(atoms, weight, _gram(root)).to(dtype)
        coefficients.append(shares)
        left = weight - torch.tensordot(shares.double(), atoms.double(), 1)
        rank = spec.ranks[index]
        dictionary, codes = left[:, :0], left[:0]
        if rank:
            dictionary, codes = unit_variance(*whitened(left, root, rank), problem.gram_of(index))
        down.append(dictionary.T.to(dtype))
        up.append(codes.T.to(dtype))
    found = SharedFactors(atoms.transpose(1, 2), torch.stack(coefficients), tuple(down), tuple(up))
    for name, tensor in found.tensors().items():
        if not bool(tensor.isfinite().all()):
            raise NumericalError(f"{problem.name}: method {METHOD!r} gave NaN or Inf in {name}")
    return found


def _shares(atoms: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """Coefficients (S,) float64 by least squares under the layer's own Gram; atoms of zeros get none."""
    if not len(atoms):
        return torch.zeros(0, dtype=torch.float64, device=weight.device)
    products = inner_products([*atoms, weight], gram)
    shares: Tensor = torch.linalg.pinv(products[:-1, :-1], hermitian=True) @ products[:-1, -1]
    return shares


def rebuild_shared(tensors: dict[str, Tensor], spec: SharedSpec) -> list[Tensor]:
    """The weights W (d_in, d_out) float64 that the stored tensors of a group stand for.

    Raises:
        ValueError: if a tensor is missing or has another shape than the spec says.
    """
    for index in range(len(spec.modules)):
        for leaf, (shape, _) in spec.tensors(index).items():
            tensor = tensors.get(f"{index}.{leaf}")
            if tensor is None or tuple(tensor.shape) != shape:
                raise ValueError(f"{spec.modules[index]}.{leaf} is missing or not {list(shape)}")
    weights = []
    if spec.whole:
        return [tensors[f"{index}.matrix"].double().T for index in range(len(spec.modules))]
    for index in range(len(spec.modules)):
        device = next(iter(tensors.values())).device
        weight = torch.zeros(spec.d_out, spec.d_in, dtype=torch.float64, device=device)
        if spec.atoms:
            for share, atom in zip(tensors[f"{index}.coefficients"].tolist(), tensors["0.atoms"], strict=True):
                weight += share * atom.double()
        if spec.ranks[index]:
            weight += tensors[f"{index}.up"].double() @ tensors[f"{index}.down"].double()
        weights.append(weight.T)
    return weights


add_method(
    Method(
        name=METHOD,
        summary=(inspect.getdoc(masa) or "").split("\n", 1)[0],
        paper="arXiv 2508.04581",
        grouping="cross_layer",
        plan=cast(Any, masa_plan),
        solve=cast(Any, masa),
        options=MasaOptions,
        needs=frozenset(),
        compresses=True,
    )
)
