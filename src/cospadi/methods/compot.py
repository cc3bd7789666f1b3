"""COMPOT: sparse codes over an orthonormal dictionary, by orthogonal Procrustes (arXiv 2602.15200)."""

from collections.abc import Mapping
from typing import Any

from cospadi.format import Factors, GroupSpec
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods._whitened import complete_dictionary_plan, stored
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import CHOOSING, Sizes, Work, eigen, numbers, product, whitening
from cospadi.methods.ranges import Natural
from cospadi.solvers.procrustes import procrustes
from cospadi.solvers.whitening import cholesky_whitening


def compot_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Procrustes rounds: an SVD of the atoms each."""
    z = Sizes.of(spec)
    (rounds,) = numbers(options, "rounds")
    each = 2 * product(z.d, z.n, z.k) + eigen(z.k) + 6 * product(z.d, z.k, z.k, wide=True)
    each = each + Work(moved=CHOOSING * z.n * z.k, kernels=40)
    return whitening(z) + product(z.d, z.d, z.n, wide=True) + eigen(z.d) + each * rounds


@method(
    "compot",
    paper="COMPOT, arXiv 2602.15200",
    plan=complete_dictionary_plan,
    grouping="matrix",
    cost=compot_cost,
    allocation="pooled",
)
def compot(problem: Problem, spec: GroupSpec, *, rounds: Natural = 20) -> Factors:
    """Sparse codes over a dictionary that is orthonormal in whitened space, both steps in closed form.

    Starts from the leading singular vectors of the whitened weights. The dictionary has at most d_in atoms; the rest of
    a larger budget goes to non-zeros. Several weights are solved side by side, under the mean Gram if their inputs
    differ.

    Args:
        problem: weights and Grams.
        spec: atoms and non-zeros.
        rounds: of dictionary and codes.

    Returns:
        the factors; `info` has the relative squared errors at the start and the end.
    """
    whitening = cholesky_whitening(mean_gram(problem))
    target = whitening.apply(stacked(problem))
    dictionary, codes, losses = procrustes(target, spec.atoms, spec.codes.nonzeros, rounds=rounds)
    return stored(whitening.undo(dictionary), codes, losses, float(target.square().sum()))
