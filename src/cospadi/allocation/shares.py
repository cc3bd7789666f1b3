"""Budgets as shares of the dense bytes, by theoretical truncation loss (SVD-LLM V2); exact arithmetic for shares."""

import math
import warnings
from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from cospadi.errors import BudgetError


def exact_keep(keep: float) -> Fraction:
    """`keep` as the decimal number that was written, so that 0.29 of 100 bytes is 29, not 28.

    Raises:
        BudgetError: if keep is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise BudgetError(f"keep is the share of bytes kept and must lie in (0, 1], not {keep}")
    return Fraction(repr(float(keep)))


def apportion(shares: Sequence[Fraction], total: int, most: Sequence[int] | None = None) -> list[int]:
    """Round shares to integers that sum to `total`: round down, then add one to those with the largest remainders.

    Args:
        shares: non-negative, with a sum of at least `total` and less than `total` + 1.
        total: the sum of the result.
        most: upper limits of the integers; None: no limits.

    Returns:
        the integers. Ties go to the earlier share.
    """
    budgets = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (budgets[i] - shares[i], i))
    missing = total - sum(budgets)
    while missing > 0:
        given = 0
        for i in order:
            if given < missing and (most is None or budgets[i] < most[i]):
                budgets[i] += 1
                given += 1
        if not given:
            break
        missing -= given
    return budgets


def truncation_loss(spectrum: npt.ArrayLike, rank: int) -> float:
    """Theoretical loss of a truncation: the root of the sum of squared singular values beyond `rank`.

    Args:
        spectrum: singular values of the whitened weight, largest first.
        rank: number of singular values kept.
    """
    tail = np.asarray(spectrum, dtype=np.float64)[rank:]
    return float(np.sqrt(np.square(tail).sum()))


def theoretical_loss(
    losses: Sequence[float],
    dense_bytes: Sequence[int],
    kinds: Sequence[Hashable],
    keep: float,
    *,
    least_keep: float = 0.05,
) -> list[int]:
    """Budgets that follow the theoretical truncation loss of each group (SVD-LLM V2, arXiv 2503.12340, section 3.1).

    Among weights of one kind (all query projections, for example) the removed share of group i is proportional to
    1 / log L_i, where L_i is its loss at the uniform budget: groups that lose more are compressed less. Each kind as a
    whole keeps the share `keep`.

    The formula takes the logarithm of L itself, the Frobenius norm over all calibration tokens, so it depends on the
    unit of the loss and on the number of tokens. For L ≤ e its shares are meaningless (infinite at 1, negative below):
    a kind with such a loss gets equal shares, with a warning.

    Args:
        losses: theoretical loss of each group at the uniform budget, summed over the calibration tokens, non-negative.
        dense_bytes: bytes of each group at 16 bits a weight.
        kinds: the kind of each group; groups of one kind share one budget.
        keep: share of bytes kept, in (0, 1].
        least_keep: smallest share of any group (`keep`, if that is smaller).

    Returns:
        bytes of each group, at most its dense bytes; they sum to floor(keep · total).

    Raises:
        BudgetError: if keep is out of range.
        ValueError: if the sequences differ in length or a loss is negative or not finite.
    """
    if not len(losses) == len(dense_bytes) == len(kinds):
        raise ValueError(f"{len(losses)} losses, {len(dense_bytes)} sizes and {len(kinds)} kinds")
    if any(not (math.isfinite(loss) and loss >= 0) for loss in losses):
        raise ValueError("a loss must be finite and not negative")
    exact = exact_keep(keep)
    kept: list[Fraction] = [Fraction(0)] * len(losses)
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        small = [losses[i] for i in members if losses[i] <= math.e]
        if small:
            warnings.warn(
                f"{kind}: a theoretical loss of {min(small):.3g} is too small for the formula of SVD-LLM V2, "
                "1 / log L with L > e; these layers keep equal shares",
                stacklevel=2,
            )
        weights = [Fraction(1) if small else Fraction(1 / math.log(losses[i])) for i in members]
        limits = [dense_bytes[i] * (1 - min(exact, Fraction(repr(least_keep)))) for i in members]
        removed = _fill(
            [w * dense_bytes[i] for w, i in zip(weights, members, strict=True)],
            limits,
            (1 - exact) * sum(dense_bytes[i] for i in members),
        )
        for i, gone in zip(members, removed, strict=True):
            kept[i] = dense_bytes[i] - gone
    return apportion(kept, math.floor(exact * sum(dense_bytes)), dense_bytes)


def _fill(weights: list[Fraction], limits: list[Fraction], amount: Fraction) -> list[Fraction]:
    """Distribute `amount` in proportion to `weights` up to the limits; the excess of a full one goes to the others."""
    filled = [Fraction(0)] * len(weights)
    open_ = set(range(len(weights)))
    while open_ and amount > 0:
        scale = amount / sum(weights[i] for i in open_)
        full = {i for i in open_ if weights[i] * scale >= limits[i]}
        for i in full or open_:
            filled[i] = limits[i] if full else weights[i] * scale
            amount -= filled[i]
        open_ -= full or open_
    return filled
