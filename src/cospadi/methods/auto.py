"""Automatic choice: each group gets the representation that loses the least quality for its bytes.

The engine compares the candidates below on the calibration text and distributes one budget over all groups. This is a
knapsack as in ROCKET (arXiv 2602.11008), but it also chooses representations and uses measured sensitivity. This module
defines the candidates, and the choice that shapes alone suggest, which dry runs show.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from cospadi.format import Factors, GroupSpec
from cospadi.methods._identity import integer_plan
from cospadi.methods.base import GroupShape, Problem, get_method, method
from cospadi.methods.pursuit import pursuit_plan

Bits = Literal["any", 16]
FITTED = {"shifts": 1, "rescale": 3}
"""Options with which `gptq` fits zero points and scales to the Gram, not only to the weights. Compared to the defaults
the squared error falls by 14, 6 and 4 % at 2, 3 and 4 bits (random weights, Gram with a decaying spectrum, groups of
64)."""


@dataclass(frozen=True)
class Choice:
    """A method with options, and the range of sizes in which it is worth trying.

    Attributes:
        method: its name.
        options: of the method.
        least: smallest share of the 16-bit bytes.
        most: largest share.
        costly: whether to drop it for groups of a kind once it has fallen far behind there.
        fixed: whether the options determine the size.
        learnt: whether its error relative to others is carried over from groups of the same kind.
        each: whether each layer of a group may choose it independently.
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
    """Options of `gptq` for integers of a given number of bits."""
    return dict(FITTED) if bits < 8 else {}


def _integers() -> list[Choice]:
    """Plain integers of all bits, solved everywhere for one group size; errors of other sizes are carried over."""

    def plain(bits: int, group: int, learnt: bool) -> Choice:
        options = {"bits": bits, "group": group} | _fitted(bits)
        return Choice("gptq", options, fixed=True, learnt=learnt, each=True)

    solved = [plain(8, 128, False), *(plain(bits, 64, False) for bits in (4, 3, 2))]
    others = {8: (32,), 4: (32, 128), 3: (32, 128, 256), 2: (32, 128, 256)}
    return solved + [plain(bits, group, True) for bits, groups in others.items() for group in groups]


def choices(bits: Bits) -> list[Choice]:
    """The candidates.

    Sparse integers without a dictionary are not among them: on a trained model they never beat a mixture of plain
    integers of two and three bits, and they are expensive to solve.

    Args:
        bits: 16: only sparse codes of 16-bit values, with and without a dictionary, to compare with methods that have
            no others. ``"any"``: integers of 8 to 2 bits, and dictionaries with sparse integer codes.
    """
    if bits == 16:
        pruned = Choice("sparsegpt", costly=True, each=True)
        patterns = ("16:32", "12:32", "10:32")
        return [pruned, *(Choice("pursuit", {"pattern": pattern}, costly=True) for pattern in patterns)]

    def dictionary(bits: int, least: float, most: float) -> Choice:
        options = {"dictionary_bits": bits, "value_bits": bits, "pattern": "16:32"}
        return Choice("pursuit", options, least, most, costly=True)

    # Integers without a dictionary cannot go below about 0.13. Above that, dictionaries compete with them.
    return [*_integers(), dictionary(4, 0.03, 0.14), dictionary(3, 0.03, 0.14), dictionary(8, 0.25, 0.5)]


def auto_plan(shape: GroupShape, budget: int, *, bits: Bits = "any") -> GroupSpec:
    """The choice by shapes alone: integers of the most bits that fit, else a dictionary with 4-bit factors."""
    if bits == 16:
        return pursuit_plan(shape, budget)
    spec = integer_plan(shape, budget)
    return spec if spec.bytes <= budget else pursuit_plan(shape, budget, dictionary_bits=4, value_bits=4)


def solved_by(spec: GroupSpec) -> tuple[str, dict[str, Any]]:
    """The method and options that solve a spec which `auto` offers."""
    if spec.dictionary is not None:
        return "pursuit", {}
    return ("sparsegpt", {}) if spec.codes.sparse else ("gptq", _fitted(spec.codes.bits))


@method("auto", paper="this project", plan=auto_plan, grouping="siblings")
def auto(problem: Problem, spec: GroupSpec) -> Factors:
    """Chooses method, bits and size of every group by measured sensitivity, within one byte budget.

    Args:
        problem: weights and Grams.
        spec: one that the method offers.
    """
    name, options = solved_by(spec)
    return get_method(name).factorise(problem, spec, options)
