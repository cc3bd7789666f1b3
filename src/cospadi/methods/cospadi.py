"""CoSpaDi: calibration-guided sparse dictionary learning by K-SVD (arXiv 2509.22075)."""

from collections.abc import Mapping
from typing import Any, Literal

from cospadi.format import Factors, GroupShape, GroupSpec
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods._whitened import stored
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Sizes, Work, numbers, product, whitening
from cospadi.methods.ranges import AtomsPerNonzero, Below1, Count
from cospadi.methods.sizing import sparse_dictionary_plan
from cospadi.solvers.ksvd import ksvd
from cospadi.solvers.whitening import cholesky_whitening


def cospadi_plan(
    shape: GroupShape, budget: int, *, rho: AtomsPerNonzero = 2.0, value_bits: Literal[14, 16] = 16
) -> GroupSpec:
    """Eq. 10: 16-bit dictionary and values, one mask bit per code, k atoms and s = k/rho non-zeros per column.

    With 14-bit values (bfloat16 without its two lowest mantissa bits) and rho = 2 this is Eq. 11.
    """
    return sparse_dictionary_plan(shape, budget, rho=rho, value_bits=value_bits)


SMALL_PASSES = 1.8
"""What choosing codes costs in K-SVD's many short passes, against one long one (measured)."""


def ksvd_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Orthogonal matching pursuit and the dictionary update, round by round."""
    z = Sizes.of(spec)
    rounds, iterations = numbers(options, "rounds", "power_iterations")
    # orthogonal matching pursuit: every step reads all correlations of the atoms chosen before
    code = (
        Work(moved=SMALL_PASSES * 2.0 * z.n * z.k * z.s**2, kernels=15 * z.s)
        + product(z.d, z.n, z.k)
        + product(z.d, z.k, z.k)
    )
    if options["update"] == "ksvd":  # every atom passes over the residual: twice an iteration, and to be put back
        passes = 2 * iterations + 5
        sweep = Work(moved=SMALL_PASSES * 4.0 * z.k * z.d * z.n * passes, kernels=40 * z.k)
    else:
        sweep = 2 * product(z.n, z.k, z.k) + 2 * product(z.d, z.n, z.k) + Work(products=z.k**3, kernels=60)
    return whitening(z) + (code + sweep) * rounds


@method("cospadi", paper="CoSpaDi, arXiv 2509.22075", plan=cospadi_plan, grouping="matrix", cost=ksvd_cost)
def cospadi(
    problem: Problem,
    spec: GroupSpec,
    *,
    rounds: Count = 60,
    power_iterations: Count = 8,
    tolerance: Below1 = 0.0,
    whiten: bool = True,
    update: Literal["ksvd", "mod"] = "ksvd",
) -> Factors:
    """Sparse dictionary by OMP and K-SVD on Cholesky-whitened weights, as published.

    Several weights are solved side by side, under the mean Gram if their inputs differ (appendix A.4).

    Args:
        problem: weights and Grams.
        spec: atoms and non-zeros.
        rounds: of sparse coding and dictionary update.
        power_iterations: per atom and round.
        tolerance: stop once a round lowers the error by less than this share; 0: run all rounds.
        whiten: False: the data-free variant, which minimises the error of the weights.
        update: ``"ksvd"``: atom by atom; ``"mod"``: all atoms at once by least squares.

    Returns:
        the factors; `info` has the number of rounds and the relative squared errors after the first and the last.
    """
    weights = stacked(problem)
    whitening = cholesky_whitening(mean_gram(problem)) if whiten else None
    target = whitening.apply(weights) if whitening else weights
    dictionary, codes, losses = ksvd(
        target,
        spec.atoms,
        spec.codes.nonzeros,
        rounds=rounds,
        power_iterations=power_iterations,
        tolerance=tolerance,
        seed=problem.seed,
        update=update,
    )
    dictionary = whitening.undo(dictionary) if whitening else dictionary
    return stored(dictionary, codes, losses, float(target.square().sum()))
