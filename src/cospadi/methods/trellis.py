"""Trellis codes of rotated weights: a few bits a weight at nearly the error that theory allows."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import cat

from cospadi.format import Factors, GroupShape, GroupSpec, MatrixSpec, Rotation, Stored, Trellis
from cospadi.methods._rotated import rotated
from cospadi.methods.base import Problem, method
from cospadi.methods.cost import Sizes, Work, eigen, numbers, product
from cospadi.methods.ranges import Count, Natural, NonNegative
from cospadi.solvers import trellis_rows as solver

StateBits = Annotated[int, Field(ge=8, le=16)]
"""Bits of a state: each more halves the alphabet's gaps and doubles the time to encode."""
TILE = 256
"""Values of a tile."""
QUICK_STATE: Mapping[str, Mapping[str, Any]] = {"cpu": {"state": 10}}
"""A state that a processor encodes in minutes instead of hours."""
LONG = 1024
"""Inputs from which on a tile holds eight of them instead of four."""


def trellis_plan(
    shape: GroupShape,
    budget: int,
    *,
    bits: Literal[0, 1, 2, 3, 4] = 0,
    state: StateBits = 16,
    inputs: Literal[0, 4, 8, 16, 32] = 0,
    block: Literal[16, 32, 64, 128, 256] = 128,
    scales: bool = True,
) -> GroupSpec:
    """The most bits per weight within the budget.

    Args:
        shape: the layers.
        budget: bytes.
        bits: 4, 3, 2 or 1; 0: the most that fit, at least 2.
        state: bits of a state. 16 has the smallest error and is the default on a GPU. Every bit less halves the time
            to encode; a processor takes 10 unless told otherwise, with about 13 % more error.
        inputs: inputs of a tile of 256 weights; 0: 4, or 8 where a layer has more than 1024 inputs. The fewer, the
            better the feedback between tiles, and the more steps it takes.
        block: largest block of the rotation.
        scales: whether the rotation has scales, two bytes per input.
    """
    each = inputs or (8 if shape.d_in > LONG else 4)
    code = Trellis(state, each, TILE // each)
    spec = None
    for width in [bits] if bits else [4, 3, 2]:
        codes = MatrixSpec(sum(shape.d_out), shape.d_in, bits=width, trellis=code)
        spec = GroupSpec(shape.modules, shape.d_in, shape.d_out, codes, rotation=Rotation(block, scales))
        if spec.bytes <= budget:
            break
    assert spec is not None  # the loop runs at least once
    return spec


SEARCH, SEARCH_CPU = 2.5, 3.2e-4
"""What a state costs per value, both passes around the tile together: memory traffic in bytes, as an H100 encodes many
tiles at once (58,000 a second at 16 bits), and more on a processor, in kernels (3,250 tiles a second at 10 bits on two
threads)."""
TURN, WAITING = 40.0, 80.0
"""Kernels of a turn, and states for which a turn takes as long as one more: a tile is searched step by step, however
few of them there are."""


def trellis_cost(spec: GroupSpec, options: Mapping[str, Any]) -> Work:
    """Rotation, feedback between blocks, and the search for the best path through every tile."""
    z, code = Sizes.of(spec), spec.codes.trellis
    assert code is not None
    rounds, sweeps = numbers(options, "rounds", "sweeps")
    passes = rounds + sweeps
    states = float(2**code.state)
    paths = Work(
        moved=SEARCH * z.n * z.d * states,
        kernels=(TURN + states / WAITING) * z.d / code.inputs,
        cpu_kernels=SEARCH_CPU * z.n * z.d * states,
    )
    factors = eigen(z.d) + Work(products=6.0 * z.d**3)
    return factors + passes * (2 * product(z.n, z.d, z.d) + paths)


@method(
    "trellis",
    paper="QTIP, arXiv 2406.11235",
    plan=trellis_plan,
    cost=trellis_cost,
    grouping="siblings",
    sequential=True,
    by_device=QUICK_STATE,
)
def trellis(
    problem: Problem,
    spec: GroupSpec,
    *,
    damping: NonNegative = 0.01,
    rounds: Count = 1,
    sweeps: Natural = 0,
) -> Factors:
    """Trellis codes of 1 to 4 bits on rotated weights, with error feedback from tile to tile.

    The input is multiplied by random signs and by Walsh–Hadamard matrices, after which weights are nearly normal and no
    input stands out. A tile of 256 weights is one circular stream of bits; the levels of all its weights are chosen
    together (Viterbi), and tiles not yet encoded compensate for its error under the Gram. Every output has one scale,
    fitted under the Gram. Layers are compressed in order, each under the Gram of what the layers before it leave.

    Args:
        problem: weights and Grams.
        spec: bits, state, tiles and rotation.
        damping: of the Gram, as a share of its mean diagonal.
        rounds: of encoding; every further one starts from the scales that the one before has fitted.
        sweeps: of coordinate descent over all tiles afterwards.
    """
    code = spec.codes.trellis
    if code is None:
        raise ValueError(f"{problem.name}: the spec has no trellis")
    turned = rotated(problem, spec)
    found = solver.trellis_many(
        [solver.Problem(rows, turned.gram_of(i)) for i, rows in enumerate(turned.rows)],
        solver.TrellisCode(spec.codes.bits, code.state, code.inputs, code.outputs),
        damping=damping,
        rounds=rounds,
        sweeps=sweeps,
        dtype=problem.dtype,
    )
    codes = Stored(cat([part.symbols for part in found]), cat([part.scales for part in found])[:, None])
    return Factors(codes, rotation=turned.stored)
