"""Random factors of every kind the format knows, and tiny compressed models made of them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from cospadi.checkpoint import format_for, storage_dtype
from cospadi.format import (
    Factors,
    GroupSpec,
    MatrixSpec,
    Rotation,
    Stored,
    StoredRotation,
    Trellis,
    part_of,
    split_codes,
    unpack,
)
from cospadi.format.hadamard import hadamard
from cospadi.format.pack import integer_range, spread
from cospadi.format.patterns import keep_largest

Kind = tuple[dict[str, Any], dict[str, Any] | None]

# codes, dictionary (None: identity); nonzeros are clipped to what the shape allows
KINDS: dict[str, Kind] = {
    "free16": ({"pattern": "free", "nonzeros": 7}, {}),
    "balanced8": ({"pattern": "3:8", "bits": 8, "group": 4}, {"bits": 8, "group": 5}),
    "word4": ({"pattern": "11:32", "bits": 4, "group": 3}, {"bits": 4}),
    "free14": ({"pattern": "free", "nonzeros": 5, "bits": 14}, {"bits": 14}),
    "zeros3": ({"pattern": "9:16", "bits": 3, "group": 4, "symmetric": False}, {"bits": 3, "group": 7}),
    "free2": ({"pattern": "free", "nonzeros": 6, "bits": 2}, {"bits": 2, "group": 8, "symmetric": False}),
    "low_rank": ({}, {}),
    "pruned": ({"pattern": "2:4"}, None),
    "pruned8": ({"pattern": "1:4", "bits": 8, "symmetric": False, "group": 2}, None),
    "rounded4": ({"bits": 4, "group": 8}, None),
    "halves3": (
        {"pattern": "9:16", "bits": 3, "group": 4, "half": True},
        {"bits": 4, "group": 7, "symmetric": False, "half": True},
    ),
    "trellis2": ({"bits": 2, "trellis": Trellis(10, 4, 16)}, None),
}
ROTATIONS = {"halves3": Rotation(8, scales=False), "trellis2": Rotation(16)}
"""Of the kinds that have one."""


def make_spec(kind: str, modules: Sequence[str], d_in: int, d_out: Sequence[int], atoms: int = 20) -> GroupSpec:
    """A group of one of the kinds."""
    codes, dictionary = KINDS[kind]
    columns = d_in if dictionary is None else atoms
    return GroupSpec(
        tuple(modules),
        d_in,
        tuple(d_out),
        MatrixSpec(sum(d_out), columns, **codes),
        None if dictionary is None else MatrixSpec(atoms, d_in, **dictionary),
        method=kind,
        rotation=ROTATIONS.get(kind),
    )


def random_stored(spec: MatrixSpec, generator: torch.Generator, dtype: torch.dtype) -> Stored:
    """A matrix that the spec can hold exactly (16 and 14 bits: up to rounding); with a trellis its symbols."""
    if spec.trellis is not None:
        return random_symbols(spec, spec.trellis.tiles(spec.rows, spec.columns)[0], generator, dtype)
    mask = None
    if spec.sparse:
        magnitude = torch.rand(spec.columns, spec.rows, generator=generator)
        mask = keep_largest(magnitude, spec.nonzeros, spec.pattern).T
    scales = zeros = None
    if spec.integer:
        low, high = integer_range(spec.bits, spec.symmetric, spec.half)
        scales = (torch.rand(spec.rows, spec.groups, generator=generator) + 0.5).div(high * 4).to(dtype).float()
        levels = torch.randint(low, high + 1, (spec.rows, spec.nonzeros), generator=generator).float()
        if not spec.symmetric:
            steps = 2 if spec.half else 1
            zeros = torch.randint(low * steps, high * steps + 1, (spec.rows, spec.groups), generator=generator) / steps
            levels = levels - spread(zeros, spec)
        elif spec.half:
            levels = levels - high / 2
        values = levels * spread(scales, spec)
    else:
        values = torch.randn(spec.rows, spec.nonzeros, generator=generator) * spec.columns**-0.5
    if mask is None:
        return Stored(values, scales, zeros)
    matrix = torch.zeros(spec.rows, spec.columns).masked_scatter(mask, values)
    return Stored(matrix, scales, zeros, mask)


def random_symbols(spec: MatrixSpec, tiles: int, generator: torch.Generator, dtype: torch.dtype) -> Stored:
    """Symbols and scales of a trellis; `tiles`: along its rows."""
    assert spec.trellis is not None
    shape = (tiles, spec.trellis.tiles(1, spec.columns)[1], spec.trellis.values)
    symbols = torch.randint(0, 2**spec.bits, shape, generator=generator).to(torch.uint8)
    scales = (torch.rand(spec.rows, 1, generator=generator) + 0.5) / 148 * spec.columns**-0.5
    return Stored(symbols, scales.to(dtype).float())


def random_rotation(rotation: Rotation, d_in: int, generator: torch.Generator, dtype: torch.dtype) -> StoredRotation:
    """Random signs and scales."""
    signs = torch.randint(0, 2, (d_in,), generator=generator) * 2 - 1
    scales = (torch.rand(d_in, generator=generator) + 0.5).to(dtype).float() if rotation.scales else None
    return StoredRotation(signs, scales)


def random_factors(spec: GroupSpec, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Factors:
    """Factors that fit a group."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = None if spec.dictionary is None else random_stored(spec.dictionary, generator, dtype)
    if spec.codes.trellis is not None:
        codes = random_symbols(spec.codes, sum(spec.lengths("values")), generator, dtype)
    else:
        codes = random_stored(spec.codes, generator, dtype)
    rotation = None if spec.rotation is None else random_rotation(spec.rotation, spec.d_in, generator, dtype)
    return Factors(codes, dictionary, rotation=rotation)


def dense_rows(spec: GroupSpec, factors: Factors, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weights (sum of d_out, d_in) in float64 that packed factors stand for, one matrix product after the other."""
    packed = factors.pack(spec, dtype)
    parts = enumerate(split_codes(spec, part_of(packed, "codes")))
    rows = torch.cat([unpack(part, spec.module_codes(index), torch.float64) for index, part in parts])
    if spec.dictionary is not None:
        rows = rows @ unpack(part_of(packed, "dictionary"), spec.dictionary, torch.float64)
    if spec.rotation is not None and factors.rotation is not None:
        matrix = hadamard(torch.eye(spec.d_in, dtype=torch.float64), spec.rotation.block)
        scales = factors.rotation.scales
        rows = rows @ (factors.rotation.signs * (1.0 if scales is None else scales)).double().diag().mm(matrix).T
    return rows


def install(model: PreTrainedModel, spec: GroupSpec, factors: Factors) -> None:
    """Pack the factors of one group, rounded to the model's 16-bit float, into its layers."""
    format_for(spec).install(model, spec, factors.pack(spec, storage_dtype(model)))


def tiny_groups(model: PreTrainedModel, kinds: Sequence[str] = tuple(KINDS), atoms: int = 20) -> list[GroupSpec]:
    """Sibling groups of a Llama-like model, kinds in turn; siblings of q, k, v get kinds in turn too."""
    found = []
    for number in range(model.config.num_hidden_layers):
        layer = f"model.layers.{number}."
        for leaves in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            part = "self_attn" if leaves[0] in "qo" else "mlp"
            found.append([f"{layer}{part}.{leaf}_proj" for leaf in leaves])
    groups = []
    for number, names in enumerate(found):
        linears = [model.get_submodule(name) for name in names]
        d_out = [linear.out_features for linear in linears]
        groups.append(make_spec(kinds[number % len(kinds)], names, linears[0].in_features, d_out, atoms))
    return groups


def compress_randomly(
    model: PreTrainedModel, kinds: Sequence[str] = tuple(KINDS), seed: int = 0, atoms: int = 20
) -> list[GroupSpec]:
    """Replace every linear layer of the decoder by random factors, and return the groups."""
    groups = tiny_groups(model, kinds, atoms)
    dtype = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
    for number, spec in enumerate(groups):
        install(model, spec, random_factors(spec, seed + number, dtype))
    return groups
