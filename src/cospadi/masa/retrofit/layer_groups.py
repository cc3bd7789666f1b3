"""Which layers share their atoms: consecutive ones whose outputs mean the same words (MASA, arXiv 2508.04581).

Layers are compared by the distributions that the logit lens (`cospadi.calibration.logit_lens`) reads off them: where
those of two consecutive layers are far apart by their Kullback-Leibler divergence, a group ends.
"""

from __future__ import annotations

from torch import Tensor

from cospadi.errors import RecipeError


def divergences(log_probabilities: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p_l ‖ p_{l+1}) of consecutive layers, in nats.

    Args:
        log_probabilities: (layers, vocabulary).

    Returns:
        (layers − 1,) float64, not negative.
    """
    before, after = log_probabilities[:-1].double(), log_probabilities[1:].double()
    return (before.exp() * (before - after)).sum(-1).clamp_min(0)


def group_layers(distances: Tensor, *, groups: int | None = None, threshold: float | None = None) -> list[range]:
    """Cut the layers into consecutive groups where neighbours are furthest apart.

    Args:
        distances: (layers − 1,), of :func:`divergences`.
        groups: how many; the cuts are at the largest distances, of equal ones at the first.
        threshold: instead: a cut wherever the distance is larger.

    Returns:
        the layers of each group, in order.

    Raises:
        RecipeError: if not exactly one of the two is given, or there are more groups than layers.
    """
    layers = len(distances) + 1
    if (groups is None) == (threshold is None):
        raise RecipeError("layers are grouped by their number of groups or by a threshold: give one of the two")
    if groups is not None:
        if not 1 <= groups <= layers:
            raise RecipeError(f"{groups} groups of {layers} layers are not possible: give 1 to {layers}")
        order = sorted(range(layers - 1), key=lambda i: (-float(distances[i]), i))
        cuts = sorted(order[: groups - 1])
    else:
        assert threshold is not None
        cuts = [i for i in range(layers - 1) if float(distances[i]) > threshold]
    begins = [0, *(cut + 1 for cut in cuts)]
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], layers], strict=True)]
