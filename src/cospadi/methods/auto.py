"""Automatic choice: every group gets the representation that harms the model least for its bytes.

The engine compares the families below on the calibration text and spreads one budget over all groups (a knapsack,
after ROCKET, arXiv 2602.11008, but over representations too, and on measured harm). What is here is what may be
chosen, and the choice that shapes alone suggest, which dry runs show.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import integer_plan
from cospadi.methods.base import GroupShape, Problem, get_method, method
from cospadi.methods.pursuit import pursuit_plan

Bits = Literal["any", 16]
FITTED = {"shifts": 1, "rescale": 3}
"""Integers with zero points and scales fitted to the Gram, not only to the weights: 14, 6 and 4 per cent less squared
error at 2, 3 and 4 bits than `gptq` has by default (random weights, Gram with a decaying spectrum, groups of 64)."""


@dataclass(frozen=True)
class Choice:
    """A method with options, and the shares of bytes between which it is worth trying.

    Attributes:
        method: its name.
        options: of that method.
        least: least share of the bytes at 16 bits.
        most: largest share.
        costly: whether it is given up for groups of a kind where it has shown to be far behind.
        fixed: whether the options leave no choice of size.
        learnt: whether its errors, compared to those of others, are carried over from groups of the same kind.
        each: whether every layer of a group may choose it for itself.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    least: float = 0.0
    most: float = 1.0
    costly: bool = False
    fixed: bool = False
    learnt: bool = False
    each: bool = False


def _fitted(bits: int) -> dict[str, Any]:
    """Options of `gptq` for integers of so many bits."""
    return dict(FITTED) if bits < 8 else {}


def _integers() -> list[Choice]:
    """Plain integers of all bits, solved everywhere for one group size; the other sizes are carried over."""

    def plain(bits: int, group: int, learnt: bool) -> Choice:
        options = {"bits": bits, "group": group} | _fitted(bits)
        return Choice("gptq", options, fixed=True, learnt=learnt, each=True)

    solved = [plain(8, 128, False), *(plain(bits, 64, False) for bits in (4, 3, 2))]
    others = {8: (32,), 4: (32, 128), 3: (32, 128, 256), 2: (32, 128, 256)}
    return solved + [plain(bits, group, True) for bits, groups in others.items() for group in groups]


def choices(bits: Bits) -> list[Choice]:
    """What may be chosen.

    Sparse integers without a dictionary are not among them: on a trained model they never fell below the line between
    plain integers of two and of three bits, and they are dear to solve.

    Args:
        bits: 16: sparse codes of 16-bit values only, with a dictionary and without, to compare with methods that have
            no others; ``"any"``: integers of 8 to 2 bits, and dictionaries with sparse codes of such.
    """
    if bits == 16:
        pruned = Choice("sparsegpt", costly=True, each=True)
        patterns = ("16:32", "12:32", "10:32")
        return [pruned, *(Choice("pursuit", {"pattern": pattern}, costly=True) for pattern in patterns)]

    def dictionary(bits: int, least: float, most: float) -> Choice:
        options = {"dictionary_bits": bits, "value_bits": bits, "pattern": "16:32"}
        return Choice("pursuit", options, least, most, costly=True)

    # Integers without a dictionary end at about 0.13. Above that, dictionaries have to show what they are worth.
    return [*_integers(), dictionary(4, 0.03, 0.14), dictionary(3, 0.03, 0.14), dictionary(8, 0.25, 0.5)]


def auto_plan(shape: GroupShape, budget: int, *, bits: Bits = "any") -> GroupSpec:
    """What shapes alone suggest: integers of the most bits that fit, else a dictionary with 4-bit factors."""
    if bits == 16:
        return pursuit_plan(shape, budget)
    spec = integer_plan(shape, budget)
    return spec if spec.bytes <= budget else pursuit_plan(shape, budget, dictionary_bits=4, value_bits=4)


def solved_by(spec: GroupSpec) -> tuple[str, dict[str, Any]]:
    """The method that solves a spec which `auto` offers, and its options."""
    if spec.dictionary is not None:
        return "pursuit", {}
    return ("sparsegpt", {}) if spec.codes.sparse else ("gptq", _fitted(spec.codes.bits))


@method("auto", paper="this project", plan=auto_plan, grouping="siblings")
def auto(problem: Problem, spec: GroupSpec) -> Factors:
    """Chooses method, bits and bytes for every group by measured harm, under one byte budget.

    Args:
        problem: weights and Grams.
        spec: any of those that the method offers.
    """
    name, options = solved_by(spec)
    return get_method(name).factorise(problem, spec, options)
