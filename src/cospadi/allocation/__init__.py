"""How many bytes each group gets. Sees only sizes and predicted losses, never a model or a tensor."""

from cospadi.allocation.multiple_choice import Candidate, knapsack, smallest_cap
from cospadi.allocation.shares import theoretical_loss, truncation_loss
from cospadi.allocation.spectra import pooled_spectra

__all__ = [
    "Candidate",
    "knapsack",
    "pooled_spectra",
    "smallest_cap",
    "theoretical_loss",
    "truncation_loss",
]
