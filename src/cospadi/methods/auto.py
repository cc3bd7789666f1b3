"""Automatic choice: every group gets the representation that harms the model least for its bytes.

The engine compares the families below on the calibration text and spreads one budget over all groups (a knapsack,
after ROCKET, arXiv 2602.11008, but over representations too, and on measured harm). What is here is what may be
chosen, and the choice that shapes alone suggest, which dry runs show.
"""

from collections.abc import Mapping
from typing import Any, Literal

from cospadi.format import GroupShape, GroupSpec, Solution
from cospadi.methods._identity import integer_plan
from cospadi.methods.base import Problem, get_method, method
from cospadi.methods.cost import Work
from cospadi.methods.pursuit import pursuit_plan
from cospadi.methods.representation import Representation

Bits = Literal["any", 16]
FITTED = {"shifts": 1, "rescale": 3}
"""Integers with zero points and scales fitted to the Gram, not only to the weights: 14, 6 and 4 per cent less squared
error at 2, 3 and 4 bits than `gptq` has by default (random weights, Gram with a decaying spectrum, groups of 64)."""


def _fitted(bits: int) -> dict[str, Any]:
    """Options of `gptq` for integers of so many bits."""
    return dict(FITTED) if bits < 8 else {}


def _integers() -> list[Representation]:
    """Plain integers of all bits, solved everywhere for one group size; the other sizes are carried over."""

    def plain(bits: int, group: int, learnt: bool) -> Representation:
        options = {"bits": bits, "group": group} | _fitted(bits)
        return Representation("gptq", options, fixed=True, learnt=learnt, each=True)

    solved = [plain(8, 128, False), *(plain(bits, 64, False) for bits in (4, 3, 2))]
    others = {8: (32,), 4: (32, 128), 3: (32, 128, 256), 2: (32, 128, 256)}
    return solved + [plain(bits, group, True) for bits, groups in others.items() for group in groups]


def choices(bits: Bits) -> list[Representation]:
    """What may be chosen.

    Sparse integers without a dictionary are not among them: on a trained model they never fell below the line between
    plain integers of two and of three bits, and they are dear to solve.

    Args:
        bits: 16: sparse codes of 16-bit values only, with a dictionary and without, to compare with methods that have
            no others; ``"any"``: integers of 8 to 2 bits, and dictionaries with sparse codes of such.
    """
    if bits == 16:
        pruned = Representation("sparsegpt", costly=True, each=True)
        patterns = ("16:32", "12:32", "10:32")
        return [pruned, *(Representation("pursuit", {"pattern": pattern}, costly=True) for pattern in patterns)]

    def dictionary(bits: int, least: float, most: float) -> Representation:
        options = {"dictionary_bits": bits, "value_bits": bits, "pattern": "16:32"}
        return Representation("pursuit", options, least, most, costly=True)

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


def auto_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work | None:
    """That of the method which such a spec stands for."""
    name, options = solved_by(spec)
    return get_method(name).work(spec, dict(options))


def offers(options: Mapping[str, Any]) -> list[Representation]:
    """What `auto` may choose, by its options."""
    return choices(options["bits"])


@method(
    "auto",
    paper="this project",
    plan=auto_plan,
    grouping="siblings",
    allocation="knapsack",
    cost=auto_cost,
    offers=offers,
)
def auto(problem: Problem, spec: GroupSpec) -> Solution:
    """Chooses method, bits and bytes for every group by measured harm, under one byte budget.

    Args:
        problem: weights and Grams.
        spec: any of those that the method offers.
    """
    name, options = solved_by(spec)
    return get_method(name).factorise(problem, spec, options)
