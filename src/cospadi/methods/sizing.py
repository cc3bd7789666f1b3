"""Plans: the largest spec of a family within a byte budget. Pure arithmetic, exact by `GroupSpec.bytes`."""

from collections.abc import Callable

from cospadi.format import GroupShape, GroupSpec, MatrixSpec

WHOLE_WORDS = 640
"""From this many atoms on, balanced codes fill their last mask word. Below, that could cost more than 5 % of them."""


def largest(make: Callable[[int], GroupSpec], low: int, high: int, budget: int) -> GroupSpec:
    """The spec of the largest size in [low, high] within `budget` bytes, which grow with size; else that of `low`."""
    best = low
    while low <= high:
        middle = (low + high) // 2
        if make(middle).bytes <= budget:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return make(best)


def low_rank_plan(shape: GroupShape, budget: int) -> GroupSpec:
    """Dense 16-bit factors of the largest rank within the budget: 2 r (d_in + d_out) bytes."""
    rows = sum(shape.d_out)

    def make(rank: int) -> GroupSpec:
        return GroupSpec(shape.modules, shape.d_in, shape.d_out, MatrixSpec(rows, rank), MatrixSpec(rank, shape.d_in))

    return largest(make, 1, min(shape.d_in, rows), budget)


def sparse_dictionary_plan(
    shape: GroupShape,
    budget: int,
    *,
    rho: float = 2.0,
    pattern: str = "free",
    dictionary_bits: int = 16,
    value_bits: int = 16,
    group: int = 0,
) -> GroupSpec:
    """The most atoms k with s = k/rho non-zeros per column within the budget (CoSpaDi, Eq. 10 with any bits).

    Balanced codes of many atoms use whole mask words.

    Args:
        shape: the layers.
        budget: bytes.
        rho: atoms per non-zero; ignored for ``"n:m"``, where n and m determine it.
        pattern: ``"free"`` or ``"n:m"``; see `cospadi.format.patterns`.
        dictionary_bits: 16, 8, 4, 3 or 2.
        value_bits: 16, 14, 8, 4, 3 or 2.
        group: values per scale of integer factors; 0: one scale per row.
    """
    rows = sum(shape.d_out)

    def make(atoms: int) -> GroupSpec:
        nonzeros = min(atoms, max(1, round(atoms / rho))) if pattern == "free" else 0
        codes = MatrixSpec(rows, atoms, pattern, nonzeros, value_bits, group if value_bits <= 8 else 0)
        dictionary = MatrixSpec(atoms, shape.d_in, bits=dictionary_bits, group=group if dictionary_bits <= 8 else 0)
        return GroupSpec(shape.modules, shape.d_in, shape.d_out, codes, dictionary)

    spec = largest(make, 1, 8 * shape.d_in, budget)
    if pattern != "free" and spec.atoms >= WHOLE_WORDS:
        # Kernels read whole mask words twice as fast; an odd number of atoms makes dense products up to 6 times slower.
        return make(spec.atoms // 32 * 32)
    if pattern != "free" or spec.bytes > budget:
        return spec
    # The rest of the budget goes to more non-zeros.
    spare = (budget - spec.bytes) * 8 // (rows * value_bits)
    for extra in range(min(spare, spec.atoms - spec.codes.nonzeros), 0, -1):
        codes = MatrixSpec(rows, spec.atoms, pattern, spec.codes.nonzeros + extra, value_bits, spec.codes.group)
        richer = GroupSpec(shape.modules, shape.d_in, shape.d_out, codes, spec.dictionary)
        if richer.bytes <= budget:
            return richer
    return spec
