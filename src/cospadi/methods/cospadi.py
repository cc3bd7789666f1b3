"""CoSpaDi: calibration-guided sparse dictionary learning by K-SVD (arXiv 2509.22075)."""

from typing import Literal

from cospadi.format import Factors, GroupSpec
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods._whitened import stored
from cospadi.methods.base import GroupShape, Problem, method
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


@method("cospadi", paper="CoSpaDi, arXiv 2509.22075", plan=cospadi_plan, grouping="matrix")
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
