"""This project's sparse dictionary method: siblings share a dictionary, fitted by hard-thresholding pursuit.

Layers with the same input (q, k, v; gate, up) have the same Gram. One dictionary can therefore serve them under the
exact metric of each; its bytes are spread over more columns, and x D is computed once. Codes are balanced (n of every
32 atoms), which costs no accuracy and lets a kernel find every value without pointers.

Low-bit factors are fitted to each other in the metric of the layer's outputs. The dictionary is rounded with error
feedback under the Gram, so its rounding errors fall where inputs have little energy. (Rounding to nearest spreads them
evenly, which ruins dictionaries with more atoms than inputs.) The codes are then solved again for the rounded
dictionary and rounded with error feedback under its Gram, the dictionary is refitted to the rounded codes, and so on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cospadi.format import Factors, GroupShape, GroupSpec, MatrixSpec, Stored
from cospadi.format.patterns import keep_largest
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import CHOOSING, Sizes, Work, eigen, feedback, grid, numbers, product, whitening
from cospadi.methods.ranges import AtomsPerNonzero, CodePattern, Count, FactorBits, Natural, NonNegative, ValueBits
from cospadi.methods.sizing import sparse_dictionary_plan
from cospadi.solvers.linalg import restricted_least_squares
from cospadi.solvers.mod import least_squares_dictionary
from cospadi.solvers.pursuit import gradient_steps, lipschitz_bound, pursuit
from cospadi.solvers.quantise import fit_grid, quantise_rows
from cospadi.solvers.rounding import round_codes
from cospadi.solvers.whitening import Whitening, ridge_whitening


def pursuit_plan(
    shape: GroupShape,
    budget: int,
    *,
    rho: AtomsPerNonzero = 2.0,
    pattern: CodePattern = "auto",
    dictionary_bits: FactorBits = 16,
    value_bits: ValueBits = 16,
    group: Natural = 64,
) -> GroupSpec:
    """The most atoms within the budget.

    Args:
        shape: the layers.
        budget: bytes.
        rho: atoms per non-zero, for ``pattern="free"``.
        pattern: ``"free"``, ``"n:m"``, or ``"auto"``: 12:32, or 16:32 if 12:32 would take more atoms than there are
            inputs. (Fewer non-zeros pay for more atoms to choose from: up to a quarter less error in measurements, as
            long as the dictionary is not overcomplete.)
        dictionary_bits: 16, 8, 4, 3 or 2.
        value_bits: 16, 14, 8, 4, 3 or 2.
        group: values per scale of integer factors; 0: one scale per row.
    """
    spec = partial(
        sparse_dictionary_plan,
        shape,
        budget,
        rho=rho,
        dictionary_bits=dictionary_bits,
        value_bits=value_bits,
        group=group,
    )
    if pattern != "auto":
        return spec(pattern=pattern)
    sparser = spec(pattern="12:32")
    return sparser if sparser.atoms <= shape.d_in else spec(pattern="16:32")


@dataclass(frozen=True)
class _Target:
    """The whitened problem: Y = L W (d_in, n), the whitening L, and its Gram LᵀL."""

    whitened: Tensor
    whitening: Whitening
    gram: Tensor

    def loss(self, dictionary: Tensor, codes: Tensor) -> float:
        """Relative squared error of L D (d_in, k) and C (n, k) in whitened space."""
        energy = float(self.whitened.double().square().sum()) or 1.0
        return float((self.whitened - dictionary @ codes.T).double().square().sum()) / energy


def pursuit_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Whitening, rounds of gradient steps and dictionary updates, and the fit of the grid."""
    z = Sizes.of(spec)
    rounds, steps, refits = numbers(options, "rounds", "steps", "refits")
    step = product(z.n, z.k, z.k) + Work(moved=CHOOSING * z.n * z.k, kernels=15)
    update = product(z.n, z.k, z.k) + Work(products=4.0 * z.d * z.k**2 + 2.0 * z.k**3 / 3, kernels=60)
    each = step * steps + update + 3 * product(z.d, z.n, z.k) + product(z.d, z.k, z.k) + Work(kernels=60)
    work = whitening(z) + eigen(min(z.d, z.n)) + each * rounds + 8 * step
    if not z.integer:
        return work + step * (2 * steps)
    fit = step * (4 * steps) + grid(z.k, z.d, options["clip_search"]) + feedback(z.k, z.d)
    if z.codes_integer:
        fit = fit + _rounded_codes(z)
    return work + (fit + update) * (1 + refits)


def _rounded_codes(z: Sizes) -> Work:
    """Codes to a grid, atom after atom: once in eight parts with least squares in between, and in two sweeps."""
    descent = product(z.n, z.k, z.k) + z.k * Work(moved=1000.0 * z.n, kernels=15)
    return 3 * descent + 49 * (product(z.n, z.k, z.k) + Work(moved=60.0 * z.n * z.k, kernels=12))


@method("pursuit", paper="this project", plan=pursuit_plan, grouping="siblings", cost=pursuit_cost)
def solve(
    problem: Problem,
    spec: GroupSpec,
    *,
    rounds: Count = 50,
    steps: Count = 4,
    ridge: NonNegative = 1e-4,
    refits: Natural = 3,
    clip_search: Natural = 8,
) -> Factors:
    """Sparse dictionary shared by siblings: accelerated pursuit, balanced codes, 16 to 2 bits.

    Args:
        problem: weights and Grams; several Grams are averaged.
        spec: from :func:`pursuit_plan`.
        rounds: alternations of codes and dictionary.
        steps: gradient steps on the codes per round.
        ridge: of the whitening, as a share of the mean eigenvalue.
        refits: for integer factors: how often dictionary and codes are refitted to each other after rounding.
        clip_search: for factors of at most 4 bits: clipping ranges to try per scale.
    """
    whitening = ridge_whitening(mean_gram(problem), ridge)
    weight = stacked(problem).double()
    target = _Target(whitening.apply(weight).float(), whitening, whitening.root.T @ whitening.root)
    result = pursuit(
        target.whitened,
        spec.atoms,
        spec.codes.nonzeros,
        pattern=spec.codes.pattern,
        rounds=rounds,
        steps=steps,
        seed=problem.seed,
    )
    if spec.dictionary is None:
        raise ValueError("a sparse dictionary method needs a dictionary")
    best: tuple[float, Stored, Stored] | None = None
    dictionary, codes = result.dictionary, result.codes.T
    low_bit = spec.dictionary.integer or spec.codes.integer
    for turn in range(1 + (refits if low_bit else 0)):
        if turn:
            dictionary = least_squares_dictionary(target.whitened, codes.T, dtype=codes.dtype)
        stored_dictionary = _round_dictionary(dictionary, target, spec.dictionary, clip_search)
        dictionary = whitening.apply(stored_dictionary.matrix.T.double()).float()
        stored_codes = _fit_codes(dictionary, codes, target, spec.codes, steps, clip_search)
        codes = stored_codes.matrix
        loss = target.loss(dictionary, codes)
        if best is None or loss < best[0]:
            best = loss, stored_dictionary, stored_codes
    assert best is not None
    return Factors(codes=best[2], dictionary=best[1], info={"rounds": rounds, "whitened_error": best[0]})


def _round_dictionary(dictionary: Tensor, target: _Target, spec: MatrixSpec, clip_search: int) -> Stored:
    """Dᵀ on the stored grid, from L D with atoms of any norm; integers use error feedback under the Gram."""
    rows = target.whitening.undo(dictionary.double()).float().T.contiguous()
    if not spec.integer:
        return Stored(rows.bfloat16().float())
    found = quantise_rows(
        rows,
        bits=spec.bits,
        group=spec.group,
        symmetric=spec.symmetric,
        hessian=target.gram,
        damping=1e-6,
        search=clip_search if spec.bits <= 4 else 0,
    )
    return Stored(found.matrix, found.scales, found.zeros)


def _fit_codes(
    dictionary: Tensor, codes: Tensor, target: _Target, spec: MatrixSpec, steps: int, clip_search: int
) -> Stored:
    """C on the stored grid for a rounded L D: a few steps that may change the support, then least squares."""
    gram, right = dictionary.T @ dictionary, target.whitened.T @ dictionary
    start = torch.ones(gram.shape[0], dtype=gram.dtype, device=gram.device)
    lipschitz, _ = lipschitz_bound(gram, start, 24)
    codes = gradient_steps(codes, gram, right, lipschitz, 2 * steps, spec.nonzeros, spec.pattern)
    mask = keep_largest(codes, spec.nonzeros, spec.pattern, dim=1)
    codes = restricted_least_squares(gram, right, codes * mask, mask, iterations=2 * steps, dim=1)
    if not spec.integer:
        return Stored(codes, support=mask)
    search = clip_search if spec.bits <= 4 else 0
    stored = codes[mask].view(codes.shape[0], -1)
    grid = fit_grid(stored, bits=spec.bits, group=spec.group, symmetric=spec.symmetric, search=search)
    rounded = round_codes(codes, mask, gram, right, grid.spread(mask, spec.group or spec.nonzeros))
    return Stored(rounded, grid.scales, None if spec.symmetric else grid.zeros.int(), mask)
