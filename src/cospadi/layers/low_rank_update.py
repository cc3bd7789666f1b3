"""Adding a low-rank matrix to the weight of compressed layers, where what they store can hold the sum exactly.

A LoRA adapter of rank r is such a matrix, U V with V (r, d_in) and U (d_out, r). In ``y = (x D) S`` it is r more atoms,
the rows of V, and r more stored codes for every output. That is exact, up to the rounding of U and V to the dtype of
the stored tensors, where dictionary and codes are 16-bit floats; integers would have to be rounded again. Layers with
shared atoms (`SharedLinear`) get a part of a higher rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cospadi.format import GroupSpec, MatrixSpec, Stored, pack, unpack
from cospadi.format.leaves import codes_name, dictionary_name
from cospadi.format.pack import unpack_mask
from cospadi.format.patterns import parse_pattern
from cospadi.layers.computed_linear import ComputedLinear
from cospadi.layers.factored_linear import FactoredLinear
from cospadi.layers.shared_linear import SharedLinear


class LowRank(NamedTuple):
    """A matrix of low rank: up (d_out, r) times down (r, d_in), float."""

    down: Tensor
    up: Tensor

    def balanced(self) -> LowRank:
        """The same product with rows of `down` and columns of `up` of about equal size, scaled by powers of two."""
        down, up = self.down.float(), self.up.float()
        ratio = up.norm(dim=0) / down.norm(dim=1)
        usable = ratio.isfinite() & (ratio > 0)
        scale = torch.where(usable, ratio.clamp(2.0**-60, 2.0**60).log2().div(2).round().exp2(), 1.0)
        return LowRank(down * scale[:, None], up / scale)


def why_inexact(layer: ComputedLinear, rank: int) -> str:
    """Why a low-rank matrix cannot be added exactly; empty if it can.

    Args:
        layer: joined to its group.
        rank: of the matrix.
    """
    if any(p.is_meta for p in layer.parameters(recurse=False)):
        return "the layer is offloaded"
    if isinstance(layer, SharedLinear):
        own, most = layer.spec.ranks[layer.index], min(layer.in_features, layer.out_features)
        too_much = not layer.spec.whole and own + rank > most
        return f"its low-rank part would have rank {own + rank} of {most}" if too_much else ""
    if not isinstance(layer, FactoredLinear):
        return f"a {type(layer).__name__} stores its weight in another way"
    codes, dictionary = layer.group.codes, layer.group.dictionary
    if codes.bits != 16 or (dictionary is not None and dictionary.bits != 16):
        return f"its numbers are stored in {min(codes.bits, dictionary.bits if dictionary else 16)} bits"
    if dictionary is None or dictionary.sparse:
        return "it has no dense dictionary that could take more atoms"
    balanced = parse_pattern(codes.pattern) if codes.sparse else None
    if balanced is not None and codes.columns % balanced[1]:
        return f"its {codes.columns} atoms are no multiple of {balanced[1]}"
    return ""


@torch.no_grad()
def add_low_rank(updates: Mapping[ComputedLinear, LowRank]) -> None:
    """Add a matrix of low rank to the weight of each of some layers.

    Every layer of a group gets the new description of the group; a model must be described anew before it is saved.

    Args:
        updates: by layer; `why_inexact` is empty for each.
    """
    done: set[Any] = set()
    for layer in updates:
        if isinstance(layer, SharedLinear) and layer.owner is not None and layer not in done:
            shared = layer.owner.members
            done.update(shared)
            _add_to_shared(shared, [updates.get(member) for member in shared])
        elif isinstance(layer, FactoredLinear) and layer.siblings is not None and layer not in done:
            members = [member for member in layer.siblings.members if isinstance(member, FactoredLinear)]
            done.update(members)
            _add_to_group(members, [updates.get(member) for member in members])


def _add_to_shared(members: Sequence[SharedLinear], updates: Sequence[LowRank | None]) -> None:
    spec = members[0].spec
    for layer, update in zip(members, updates, strict=True):
        if update is None:
            continue
        held, (down, up) = layer.factors(), update
        if spec.whole:
            matrix = held["matrix"]
            matrix.copy_(matrix.float() + up.to(matrix.device).float() @ down.to(matrix.device).float())
            continue
        dtype, device = layer.weight_like
        more = update.balanced()
        parts = {"down": more.down.to(device, dtype), "up": more.up.to(device, dtype)}
        if spec.ranks[layer.index]:
            parts = {name: torch.cat([held[name], part], int(name == "up")) for name, part in parts.items()}
        for name, part in parts.items():
            _set(layer, name, part)
    if not spec.whole:
        more_ranks = (0 if update is None else len(update.down) for update in updates)
        ranks = tuple(own + more for own, more in zip(spec.ranks, more_ranks, strict=True))
        for layer in members:
            layer.spec = replace(spec, ranks=ranks)


def _add_to_group(members: Sequence[FactoredLinear], updates: Sequence[LowRank | None]) -> None:
    group = members[0].group
    columns, own, extra = _new_columns(group, [0 if update is None else len(update.down) for update in updates])
    dictionary = members[0].own_dictionary()
    assert group.dictionary is not None and dictionary is not None
    spec = replace(group.dictionary, rows=group.atoms + columns, nonzeros=0)
    atoms = torch.cat([dictionary["values"], dictionary["values"].new_zeros(columns, group.d_in)])
    codes = _codes_with(group.codes, columns, extra)
    grown = replace(group, codes=codes, dictionary=spec)
    packed = []
    for layer, update, places in zip(members, updates, own, strict=True):
        values = layer.packed_codes()["values"]
        rows, old = layer.out_features, group.module_codes(layer.index)
        matrix = torch.zeros(rows, codes.columns, dtype=torch.float32, device=values.device)
        matrix[:, : group.atoms] = unpack(layer.packed_codes(), old)
        support = None
        if codes.sparse:
            support = torch.zeros(rows, codes.columns, dtype=torch.bool, device=values.device)
            support[:, : group.atoms] = unpack_mask(layer.packed_codes()["mask"], group.atoms)
            support[:, [group.atoms + place for place in _filled(group.codes, columns, places, extra)]] = True
        if update is not None:
            down, up = update.balanced()
            where = [group.atoms + place for place in places]
            atoms[where] = down.to(atoms)
            matrix[:, where] = up.to(matrix)
        packed.append(pack(Stored(matrix, support=support), grown.module_codes(layer.index), values.dtype))
    for layer, part in zip(members, packed, strict=True):
        layer.describe(grown, layer.index)
        for role, tensor in part.items():
            _set(layer, codes_name(role), tensor)
    _set(members[0], dictionary_name("values"), atoms)
    FactoredLinear.link(members)


def _new_columns(group: GroupSpec, ranks: Sequence[int]) -> tuple[int, list[list[int]], int]:
    """Number of new atoms, each module's own among them, and how many codes each row gets.

    In whole runs under a pattern n:m, of which a module uses the first n atoms of its own; there every module stores n
    codes in every run, hence zeros in those of the others.
    """
    balanced = parse_pattern(group.codes.pattern) if group.codes.sparse else None
    n, m = balanced or (1, 1)
    own, start = [], 0
    for rank in ranks:
        own.append([start + place // n * m + place % n for place in range(rank)])
        start += -(-rank // n) * m
    if not group.codes.sparse or balanced is not None:
        return start, own, start // m * n
    return start, own, max(ranks)


def _codes_with(codes: MatrixSpec, columns: int, extra: int) -> MatrixSpec:
    nonzeros = codes.nonzeros + extra if codes.sparse else 0
    return replace(codes, columns=codes.columns + columns, nonzeros=nonzeros)


def _filled(codes: MatrixSpec, columns: int, own: Sequence[int], extra: int) -> list[int]:
    """New columns in which a module stores codes: its own, and those that its pattern demands."""
    balanced = parse_pattern(codes.pattern)
    if balanced is not None:
        return [place for place in range(columns) if place % balanced[1] < balanced[0]]
    others = [place for place in range(columns) if place not in own]
    return [*own, *others[: extra - len(own)]]


def _set(layer: nn.Module, name: str, tensor: Tensor) -> None:
    layer._parameters.pop(name, None)
    layer.register_parameter(name, nn.Parameter(tensor.contiguous(), False))
