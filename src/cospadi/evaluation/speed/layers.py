"""Timing of single groups of layers: ours, dense, two dense factors, and an unstructured bitmask of equal size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from cospadi.errors import NumericalError
from cospadi.evaluation.speed.shapes import Subject, Variant, anonymous, bitmask, first_of_shape, low_rank, shape_of
from cospadi.evaluation.speed.timing import Call, Timed, alternate, copies
from cospadi.format import GroupSpec, MatrixSpec, Packed, PackedGroup, split_codes
from cospadi.format.rotation import rotated
from cospadi.kernels import factored_linear, reference
from cospadi.kernels.synthetic import random_codes, random_packed, random_rotation
from cospadi.model_view import LinearGroup
from cospadi.runtime.memory import guard_memory

DTYPE = torch.bfloat16
FEW_TOKENS = 64  # beyond, weights are read once for so many tokens that caching them no longer matters
CHECKED_TOKENS = 16
WORST_ERROR = 2e-2  # ten times the error of bfloat16 rounding


@dataclass(frozen=True)
class StoredGroup:
    """One copy of a group's stored tensors."""

    spec: GroupSpec
    dictionary: Packed | None
    codes: Packed
    rotation: Packed | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(z D) S, (tokens, sum of d_out)."""
        if self.spec.stacked:
            return factored_linear(self.rotated(x), self.dictionary, self.spec.dictionary, self.codes, self.spec.codes)
        return self.combine(self.rotated(x) if self.dictionary is None else self.coordinates(x))

    def rotated(self, x: Tensor) -> Tensor:
        """The input z as the dictionary reads it."""
        if self.rotation is None or self.spec.rotation is None:
            return x
        return rotated(x, self.rotation, self.spec.rotation)

    def coordinates(self, x: Tensor) -> Tensor:
        """The product z D alone, in the form that :meth:`combine` takes."""
        assert self.dictionary is not None and self.spec.dictionary is not None
        return _product(self.rotated(x), self.dictionary, self.spec.dictionary, self.spec.codes)

    def combine(self, hidden: Tensor) -> Tensor:
        """The product of coordinates with S alone."""
        if self.spec.stacked:
            return _product(hidden, self.codes, self.spec.codes, None)
        parts = enumerate(split_codes(self.spec, self.codes))
        return torch.cat([_product(hidden, part, self.spec.module_codes(index), None) for index, part in parts], -1)

    def exact(self, x: Tensor) -> Tensor:
        """The same as a call, in float64."""
        z, parts = self.rotated(x.double()), enumerate(split_codes(self.spec, self.codes))
        return torch.cat(
            [reference(z, self.dictionary, self.spec.dictionary, p, self.spec.module_codes(i)) for i, p in parts], -1
        )

    def packed(self) -> PackedGroup:
        """All tensors, as a format installs them."""
        parts = {"dictionary": self.dictionary or {}, "codes": self.codes, "rotation": self.rotation or {}}
        return {f"{part}.{role}": tensor for part, packed in parts.items() for role, tensor in packed.items()}

    def clone(self) -> StoredGroup:
        """A copy elsewhere in memory."""
        dictionary = None if self.dictionary is None else _clone(self.dictionary)
        return StoredGroup(self.spec, dictionary, _clone(self.codes), self.rotation and _clone(self.rotation))


def _clone(packed: Packed) -> Packed:
    return {role: tensor.clone() for role, tensor in packed.items()}


def _product(x: Tensor, packed: Packed, spec: MatrixSpec, reader: MatrixSpec | None) -> Tensor:
    """One of the two products, as the operation computes it on this device."""
    if x.device.type == "cuda":
        from cospadi.kernels.cuda import packed_linear

        return packed_linear(x, packed, spec, DTYPE, reader)
    return factored_linear(x, None, None, packed, spec)


def random_group(spec: GroupSpec, device: torch.device, seed: int) -> StoredGroup:
    """Random factors for a spec."""
    dictionary = None
    if spec.dictionary is not None:
        dictionary = random_packed(spec.dictionary, DTYPE, device, seed)
    codes = random_codes(spec, DTYPE, device, seed + 1)
    return StoredGroup(spec, dictionary, codes, random_rotation(spec, DTYPE, device, seed + 2))


@dataclass(frozen=True)
class Bench:
    """Settings shared by all measurements of single layers."""

    device: torch.device
    rounds: int
    seed: int
    copied: float  # bytes per second of a large copy

    def copies(self, spec: GroupSpec) -> list[StoredGroup]:
        """Enough copies of one random layer to exceed the cache."""
        first = random_group(spec, self.device, self.seed)
        return [first, *(first.clone() for _ in range(copies(spec.bytes, self.device) - 1))]

    def dense(self, group: LinearGroup) -> list[Tensor]:
        """Copies of a dense weight (sum of d_out, d_in)."""
        weight = torch.randn(sum(group.d_out), group.d_in, device=self.device, dtype=DTYPE) * group.d_in**-0.5
        return [weight, *(weight.clone() for _ in range(copies(group.dense_bytes, self.device) - 1))]


def measure_layers(
    subjects: Sequence[Subject], bench: Bench, ways: dict[str, list[Variant]], tokens: Sequence[int]
) -> Iterator[list[dict[str, Any]]]:
    """Rows for every distinct shape of every subject, one shape and share of bytes at a time.

    In a checkpoint that mixes representations, the first group of a shape represents the others.

    Args:
        subjects: models; shapes that several have in common are measured once.
        bench: device, rounds, seed.
        ways: how each subject's layers are stored, by the subject's name.
        tokens: numbers of rows of x.

    Yields:
        Rows as `benchmark` describes them.
    """
    todo: dict[tuple[int, int], tuple[LinearGroup, dict[GroupSpec, Variant], list[str]]] = {}
    for subject in subjects:
        for group in first_of_shape(subject).values():
            _, specs, names = todo.setdefault(shape_of(group), (group, {}, []))
            names.append(subject.name)
            for way in ways[subject.name]:
                spec = way.of(group)
                if spec is not None:
                    specs.setdefault(anonymous(spec), way)
    for group, specs, names in todo.values():
        with guard_memory(f"measuring {group.name}", "name a smaller shape"):
            weights = bench.dense(group)
            for keep in dict.fromkeys(way.keep for way in specs.values()):
                chosen = {spec: way for spec, way in specs.items() if way.keep == keep}
                yield [row | {"shapes": names} for row in _share(group, chosen, weights, bench, tokens)]


def _share(
    group: LinearGroup, specs: dict[GroupSpec, Variant], weights: list[Tensor], bench: Bench, tokens: Sequence[int]
) -> Iterator[dict[str, Any]]:
    budget = max(spec.bytes for spec in specs)
    unstructured = bitmask(group, budget)
    rivals = {"low_rank": bench.copies(low_rank(group, budget))}
    if unstructured is not None:
        rivals["bitmask"] = bench.copies(unstructured)
    ours = {spec: bench.copies(spec) for spec in specs}
    for count in tokens:
        x = torch.randn(count, group.d_in, device=bench.device, dtype=DTYPE)
        errors = {spec: relative_error(stored[0], x) for spec, stored in ours.items()}
        calls = _calls(x, weights, rivals, ours)
        timed = alternate(calls, bench.device, bench.rounds)
        for index, (spec, way) in enumerate(specs.items()):
            yield _row(group, way, spec, count, index, timed, bench.copied) | {"error": errors[spec]}


def _calls(
    x: Tensor, weights: list[Tensor], rivals: dict[str, list[StoredGroup]], ours: dict[GroupSpec, list[StoredGroup]]
) -> dict[str, list[Call]]:
    """The calls that are timed together for one x: each variant on all copies, or on two if caching does not matter."""
    most = None if len(x) <= FEW_TOKENS else 2
    calls: dict[str, list[Call]] = {"dense": [partial(linear, x, weight) for weight in weights[:most]]}
    for name, stored in rivals.items():
        calls[name] = [partial(layer, x) for layer in stored[:most]]
    for index, stored in enumerate(ours.values()):
        calls[f"ours {index}"] = [partial(layer, x) for layer in stored[:most]]
        if len(x) == 1 and stored[0].dictionary is not None:
            hidden = stored[0].coordinates(x)
            calls[f"dictionary {index}"] = [partial(layer.coordinates, x) for layer in stored]
            calls[f"codes {index}"] = [partial(layer.combine, hidden) for layer in stored]
    return calls


def _row(
    group: LinearGroup, way: Variant, spec: GroupSpec, tokens: int, index: int, timed: dict[str, Timed], copied: float
) -> dict[str, Any]:
    mine, dense = timed[f"ours {index}"], timed["dense"]
    rate = spec.bytes / mine.median
    row: dict[str, Any] = {
        "group": "+".join(name.rsplit(".", 1)[-1] for name in group.modules),
        "d_in": group.d_in, "d_out": sum(group.d_out), "keep": way.keep, "bits": way.bits, "tokens": tokens,
        "pattern": spec.codes.pattern, "atoms": None if spec.dictionary is None else spec.atoms, "bytes": spec.bytes,
        "us": mine.median * 1e6, "dense_us": dense.median * 1e6, "of_dense": mine.over(dense),
        "bytes_per_second": rate, "of_copy": rate / copied,
    }  # fmt: skip
    for name in ("low_rank", "bitmask"):
        if name in timed:
            row |= {f"{name}_us": timed[name].median * 1e6, f"{name}_of_dense": timed[name].over(dense)}
    for name, stored in (("dictionary", spec.dictionary), ("codes", spec.codes)):
        part = timed.get(f"{name} {index}")
        if part is not None and stored is not None:
            row |= {f"{name}_us": part.median * 1e6, f"{name}_of_copy": stored.bytes / part.median / copied}
    return row


def relative_error(stored: StoredGroup, x: Tensor) -> float:
    """Relative error of the operation against float64 for the first rows of x.

    Raises:
        NumericalError: if the error is larger than rounding explains; the speed of such a kernel is meaningless.
    """
    exact = stored.exact(x[:CHECKED_TOKENS])
    error = float((stored(x)[:CHECKED_TOKENS].double() - exact).norm() / exact.norm())
    if not error < WORST_ERROR:
        raise NumericalError(
            f"the product of {len(x)} tokens with {replace(stored.spec, modules=('',) * len(stored.spec.modules))} is "
            f"wrong by {error:.1e} on {x.device}; please report it"
        )
    return error
