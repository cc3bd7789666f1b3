"""The loss-weighted Gram of a layer's input, and its blend with the plain one.

To second order, an error ΔW of a layer costs the loss Σ_t x_t ΔW (g_tᵀ g_t) ΔWᵀ x_tᵀ, where g_t is the gradient of the
loss with respect to the layer's output at token t. With only the mean over the diagonal of g_tᵀ g_t kept, what remains
is a Gram of the input in which every token has a weight s_t, the mean squared gradient over the outputs (GuidedQuant,
arXiv 2505.07004; it is the diagonal case of YAQA, arXiv 2505.22988).
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Weights of the tokens at one linear layer.

    Attributes:
        values: s, float32 (tokens,), in the order of the text, of mean 1.
        energy: squared gradient summed over the layer's outputs, mean over tokens; in a unit that is the same for all
            layers of a model.
    """

    values: Tensor
    energy: float

    @property
    def effective(self) -> float:
        """Tokens of equal weight that would estimate a mean as well: (Σ s)² / Σ s² (Kish)."""
        values = self.values.double()
        return float(values.sum().square() / values.square().sum())


@dataclass(frozen=True)
class LossGram:
    """The loss-weighted Gram of one linear layer's input.

    Attributes:
        gram: Σ s_t x_tᵀ x_t, float64 (d, d), symmetric.
        energy: of the weights: how much the layer counts beside others that read the same input.
    """

    gram: Tensor
    energy: float


def averaged(grams: Collection[LossGram]) -> Tensor | None:
    """The Gram of several layers with one input, whose weights are squared gradients summed over all their outputs.

    Args:
        grams: of the layers; those without one are left out.

    Returns:
        Σ s_t x_tᵀ x_t (d, d), s of mean 1; None where no layer has one.
    """
    if not grams:
        return None
    if len(grams) == 1:
        return next(iter(grams)).gram
    whole = sum(item.energy for item in grams)
    first, *others = grams
    total = first.gram * (first.energy / whole)
    for item in others:
        total.add_(item.gram, alpha=item.energy / whole)
    return total


def blended(plain: Tensor, loss: Tensor | None, blend: float) -> Tensor:
    """(1 − blend) · loss-weighted + blend · plain, both with the trace of the plain one.

    Args:
        plain: XᵀX / tokens (d, d) float64.
        loss: Σ s_t x_tᵀ x_t (d, d) float64 in any unit; None: there is none.
        blend: share of the plain Gram, 0 to 1. It guards against weights that leave too few tokens.

    Returns:
        (d, d) float64; `plain` itself where the blend is 1, or the loss-weighted one is missing or zero.
    """
    if loss is None or blend >= 1:
        return plain
    trace, own = plain.diagonal().sum(), loss.diagonal().sum()
    if not bool(own > 0):
        return plain
    return (loss * ((1 - blend) * trace / own)).add_(plain, alpha=blend)
