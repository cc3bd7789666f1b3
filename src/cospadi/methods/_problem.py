"""Views of a problem that most methods start from."""

import torch
from torch import Tensor

from cospadi.methods.base import Problem


def stacked(problem: Problem) -> Tensor:
    """The weights of all modules side by side, (d_in, sum of d_out), in their own dtype."""
    return torch.cat(problem.weights, 1)


def mean_gram(problem: Problem) -> Tensor:
    """The Gram of the modules' inputs, or the mean of several (CoSpaDi, appendix A.4), (d_in, d_in) float64.

    Without calibration text the identity: all inputs count alike.
    """
    if not problem.grams:
        first = problem.weights[0]
        return torch.eye(len(first), dtype=torch.float64, device=first.device)
    if len(problem.grams) == 1:
        return problem.grams[0].double()
    return torch.stack([gram.double() for gram in problem.grams]).mean(0)
