"""Shared by methods that rotate the input of a group before they round its weights."""

from dataclasses import dataclass

from torch import Tensor, cat

from cospadi.format import GroupSpec
from cospadi.format.rotation import StoredRotation
from cospadi.methods.base import Problem
from cospadi.solvers.rotate import input_scales, random_signs, rotated_gram, rotated_rows


@dataclass(frozen=True)
class Rotated:
    """A problem in the coordinates of the rotated input.

    Attributes:
        rows: (d_out, d_in) float32 of every module.
        grams: one where all modules share their Gram, else one for each.
        stored: the rotation.
    """

    rows: list[Tensor]
    grams: list[Tensor]
    stored: StoredRotation

    def gram_of(self, index: int) -> Tensor:
        """Gram of one module."""
        return self.grams[0 if len(self.grams) == 1 else index]


def rotated(problem: Problem, spec: GroupSpec) -> Rotated:
    """Rotate weights and Grams as the spec says.

    The modules share one rotation: random signs that depend on the problem's seed, and scales, if the spec has them,
    that give the weights of every input the same size.

    Args:
        problem: weights and Grams.
        spec: with a rotation.
    """
    if spec.rotation is None:
        raise ValueError(f"{spec.name}: the spec has no rotation")
    block, device = spec.rotation.block, problem.weights[0].device
    rows = [weight.T for weight in problem.weights]
    signs = random_signs(spec.d_in, problem.seed).to(device)
    scales = input_scales(cat(rows), problem.dtype) if spec.rotation.scales else None
    return Rotated(
        [rotated_rows(part, signs, scales, block) for part in rows],
        [rotated_gram(gram, signs, scales, block) for gram in problem.grams],
        StoredRotation(signs, scales),
    )
