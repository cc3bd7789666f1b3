"""COMPOT: sparse codes over an orthonormal dictionary, by orthogonal Procrustes (arXiv 2602.15200)."""

from cospadi.format import Factors, GroupSpec
from cospadi.methods._problem import mean_gram, stacked
from cospadi.methods._whitened import complete_dictionary_plan, stored
from cospadi.methods.base import Problem, method
from cospadi.methods.ranges import Natural
from cospadi.solvers.procrustes import procrustes
from cospadi.solvers.whitening import cholesky_whitening


@method("compot", paper="COMPOT, arXiv 2602.15200", plan=complete_dictionary_plan, grouping="matrix")
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
