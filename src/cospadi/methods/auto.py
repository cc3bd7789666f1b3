"""Automatic choice: each group gets the representation that loses the least quality for its bytes.

The engine compares the candidates below on the calibration text and distributes one budget over all groups. This is a
knapsack as in ROCKET (arXiv 2602.11008), but it also chooses representations and uses measured sensitivity. This module
defines the candidates, and the choice that shapes alone suggest, which dry runs show.
"""

from collections.abc import Mapping
from typing import Any, Literal

from cospadi.format import GroupShape, GroupSpec, Solution
from cospadi.methods._identity import integer_plan
from cospadi.methods.base import Problem, get_method, method
from cospadi.methods.cost import Work
from cospadi.methods.pursuit import pursuit_plan
from cospadi.methods.representation import Representation
from cospadi.methods.trellis import QUICK_STATE, StateBits, trellis_plan

Bits = Literal["any", 16]
Favour = Literal["size", "speed"]
FITTED = {"weighting": 0.5, "shifts": 1, "rescale": 3}
"""Options with which `gptq` fits zero points and scales to the Gram, not only to the weights. Compared to a search for
scales alone the squared error falls by 14, 6 and 4 % at 2, 3 and 4 bits (random weights, Gram with a decaying spectrum,
groups of 64)."""


ON_A_PROCESSOR = {"cpu": {"favour": "speed", **QUICK_STATE["cpu"]}}
"""A processor takes minutes to encode what a GPU encodes in seconds, and decodes it slowly, too."""


def _fitted(bits: int) -> dict[str, Any]:
    """Options of `gptq` for integers of a given number of bits; 8 bits gain nothing from the fit."""
    return FITTED | ({} if bits < 8 else {"shifts": 0, "rescale": 0})


def _integers() -> list[Representation]:
    """Plain integers of all bits, solved everywhere for one group size; errors of other sizes are carried over."""

    def plain(bits: int, group: int, learnt: bool) -> Representation:
        options = {"bits": bits, "group": group} | _fitted(bits)
        return Representation("gptq", options, fixed=True, learnt=learnt, each=True)

    solved = [plain(8, 128, False), *(plain(bits, 64, False) for bits in (4, 3, 2))]
    others = {8: (32,), 4: (32, 128), 3: (32, 128, 256), 2: (32, 128, 256)}
    return solved + [plain(bits, group, True) for bits, groups in others.items() for group in groups]


def _trellises(state: int) -> list[Representation]:
    """Trellis codes of all rates; encoding takes long, so errors are carried over from the first groups of a kind."""
    return [
        Representation("trellis", {"bits": bits, "state": state}, fixed=True, learnt=True, each=True)
        for bits in (4, 3, 2, 1)
    ]


def choices(bits: Bits, favour: Favour = "size", state: int = 16) -> list[Representation]:
    """The representations to choose from.

    Sparse integers without a dictionary are not among them: on a trained model they never beat a mixture of plain
    integers of two and three bits, and they are expensive to solve.

    Args:
        bits: 16: only sparse codes of 16-bit values, with and without a dictionary, to compare with methods that have
            no others. ``"any"``: integers of 8 to 2 bits, trellis codes, and dictionaries with sparse integer codes.
        favour: ``"size"``: whatever loses the least for its bytes. ``"speed"``: no trellis codes, which take more
            instructions to decode than integers.
        state: bits of a state of the trellis codes.
    """
    if bits == 16:
        pruned = Representation("sparsegpt", costly=True, each=True)
        patterns = ("16:32", "12:32", "10:32")
        return [pruned, *(Representation("pursuit", {"pattern": pattern}, costly=True) for pattern in patterns)]

    def dictionary(bits: int, least: float, most: float) -> Representation:
        options = {"dictionary_bits": bits, "value_bits": bits, "pattern": "16:32"}
        return Representation("pursuit", options, least, most, costly=True)

    # Integers without a dictionary cannot go below about 0.13. Above that, dictionaries compete with them.
    dictionaries = [dictionary(4, 0.03, 0.14), dictionary(3, 0.03, 0.14), dictionary(8, 0.25, 0.5)]
    return [*_integers(), *(_trellises(state) if favour == "size" else []), *dictionaries]


def auto_plan(
    shape: GroupShape, budget: int, *, bits: Bits = "any", favour: Favour = "size", state: StateBits = 16
) -> GroupSpec:
    """The choice by shapes alone: the most bits that fit, else a dictionary with 4-bit factors.

    Args:
        shape: the layers.
        budget: bytes.
        bits: 16: only sparse codes of 16-bit values, to compare with methods that have no others.
        favour: ``size``, or ``speed``: no trellis codes, which is the default on a processor.
        state: bits of a state of the trellis codes; 10 on a processor unless told otherwise.
    """
    if bits == 16:
        return pursuit_plan(shape, budget)
    for spec in (
        integer_plan(shape, budget, bits=8),
        trellis_plan(shape, budget, state=state) if favour == "size" else None,
    ):
        if spec is not None and spec.bytes <= budget:
            return spec
    spec = integer_plan(shape, budget)
    return spec if spec.bytes <= budget else pursuit_plan(shape, budget, dictionary_bits=4, value_bits=4)


def solved_by(spec: GroupSpec) -> tuple[str, dict[str, Any]]:
    """The method and options that solve a spec which `auto` offers."""
    if spec.dictionary is not None:
        return "pursuit", {}
    if spec.codes.trellis is not None:
        return "trellis", {}
    return ("sparsegpt", {}) if spec.codes.sparse else ("gptq", _fitted(spec.codes.bits))


def auto_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work | None:
    """That of the method which such a spec stands for."""
    name, options = solved_by(spec)
    return get_method(name).work(spec, dict(options))


def offers(options: Mapping[str, Any]) -> list[Representation]:
    """What `auto` may choose, by its options."""
    return choices(options["bits"], options["favour"], options["state"])


def wishes(device: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Statistics that cost further passes over the text: about a minute on a GPU, too long on a processor.

    On SmolLM2-135M with trellis codes of 3 bits, loss-weighted Grams lower the divergence from the dense model by 14 to
    21 % on four texts, the anchored correction by 13 to 23 %, and both together by 22 to 33 %
    (benchmarks/results/low_bits.json). 16-bit codes were not measured with them.
    """
    if device == "cpu" or options["bits"] == 16:
        return {}
    return {"sequential": True, "gram": "loss", "anchor": True, "anchor_share": 0.25}


@method(
    "auto",
    paper="this project",
    plan=auto_plan,
    grouping="siblings",
    allocation="knapsack",
    cost=auto_cost,
    offers=offers,
    by_device=ON_A_PROCESSOR,
    wishes=wishes,
)
def auto(problem: Problem, spec: GroupSpec) -> Solution:
    """Chooses method, bits and size of every group by measured sensitivity, within one byte budget.

    Args:
        problem: weights and Grams.
        spec: one that the method offers.
    """
    name, options = solved_by(spec)
    return get_method(name).factorise(problem, spec, options)
