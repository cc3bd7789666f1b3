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
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    least: float = 0.0
    most: float = 1.0
    costly: bool = False
    fixed: bool = False
    learnt: bool = False


def _integers() -> list[Choice]:
    """Plain integers of all bits, solved everywhere for one group size; the other sizes are carried over."""
    every = [Choice("gptq", {"bits": bits, "group": 64}, fixed=True) for bits in (4, 3, 2)]
    every.append(Choice("gptq", {"bits": 8, "group": 128}, fixed=True, learnt=True))
    return every + [
        Choice("gptq", {"bits": bits, "group": group}, fixed=True, learnt=True)
        for bits in (4, 3, 2)
        for group in (32, 128)
    ]


def _sparse_integers() -> list[Choice]:
    """Between 2 and 3 bits a weight, where plain integers of 2 bits lose most. Denser ones lose to plain integers."""
    return [
        Choice("sparsegpt", {"bits": 3, "pattern": f"{n}:32", "group": 64}, fixed=True, learnt=True)
        for n in (12, 14, 16)
    ]


def choices(bits: Bits) -> list[Choice]:
    """What may be chosen.

    Args:
        bits: 16: dictionaries with sparse codes of 16-bit values only, to compare with methods that have no
            others; ``"any"``: also integers of 8 to 2 bits, with a dictionary, sparse without one, and plain.
    """
    if bits == 16:
        return [Choice("pursuit", {"pattern": "16:32"}), Choice("pursuit", {"pattern": "10:32"}, costly=True)]
    # Integers without a dictionary end at about 0.12. Above that, dictionaries have to show what they are worth.
    low_bit = [
        Choice("pursuit", {"dictionary_bits": 4, "value_bits": 4, "pattern": "16:32"}, 0.03, 0.16, costly=True),
        Choice("pursuit", {"dictionary_bits": 8, "value_bits": 8, "pattern": "16:32"}, 0.25, 0.5, costly=True),
    ]
    return _integers() + _sparse_integers() + low_bit


def auto_plan(shape: GroupShape, budget: int, *, bits: Bits = "any") -> GroupSpec:
    """What shapes alone suggest: integers of the most bits that fit, else a dictionary with 4-bit factors."""
    if bits == 16:
        return pursuit_plan(shape, budget)
    spec = integer_plan(shape, budget)
    return spec if spec.bytes <= budget else pursuit_plan(shape, budget, dictionary_bits=4, value_bits=4)


@method("auto", paper="this project", plan=auto_plan, grouping="siblings")
def auto(problem: Problem, spec: GroupSpec) -> Factors:
    """Chooses method, bits and bytes for every group by measured harm, under one byte budget.

    Args:
        problem: weights and Grams.
        spec: any of those that the method offers.
    """
    name = "pursuit" if spec.dictionary is not None else "sparsegpt" if spec.codes.sparse else "gptq"
    return get_method(name).factorise(problem, spec, {})
