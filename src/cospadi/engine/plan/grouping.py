"""Which linear layers share a dictionary: none, those with one input, or one projection of neighbouring layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.errors import RecipeError
from cospadi.format import GroupShape
from cospadi.model_view import LinearGroup

LAYERS_TOGETHER = 2
"""Decoder layers in a group across layers: Basis Sharing's default, CoSpaDi's (appendix A.4), and GeoPair's pairs."""


@dataclass(frozen=True)
class Together:
    """Linear layers that will share a dictionary.

    Attributes:
        shape: their names and sizes.
        sources: the layers that read the same input: one set for all of them, or one for each.
    """

    shape: GroupShape
    sources: tuple[LinearGroup, ...]

    @property
    def layer(self) -> int:
        """Index of the first decoder layer."""
        return self.sources[0].layer


def arranged(
    sources: Sequence[LinearGroup], chosen: Sequence[LinearGroup], grouping: str, layers_name: str
) -> list[Together]:
    """All linear layers to compress, in groups that share a dictionary, in model order.

    Args:
        sources: sets of layers with one input, of the model.
        chosen: of each of them, those layers that are to be compressed.
        grouping: ``"matrix"``, ``"siblings"``, ``"cross_layer"``, ``"projection"`` or ``"pairs"``. Which pairs are
            best only the calibration text can tell; until then neighbours stand for them.
        layers_name: dotted name of the list of decoder layers.

    Raises:
        RecipeError: if layers that should share a dictionary have inputs of different sizes.
    """
    if grouping == "siblings":
        return [Together(GroupShape(g.modules, g.d_in, g.d_out), (s,)) for s, g in zip(sources, chosen, strict=True)]
    alone = [
        Together(GroupShape((name,), group.d_in, (d_out,)), (source,))
        for source, group in zip(sources, chosen, strict=True)
        for name, d_out in zip(group.modules, group.d_out, strict=True)
    ]
    if grouping == "matrix":
        return alone
    return projections(alone, layers_name) if grouping == "projection" else across(alone, layers_name)


def _kind(item: Together, layers_name: str) -> str:
    """What a linear layer is called within its decoder layer."""
    return item.shape.modules[0].removeprefix(f"{layers_name}.{item.layer}.")


def projections(alone: Sequence[Together], layers_name: str) -> list[Together]:
    """The same projection of all decoder layers together; layers of another shape are a projection of their own.

    Args:
        alone: every linear layer by itself, in model order.
        layers_name: dotted name of the list of decoder layers.
    """
    kinds = dict[tuple[str, int, tuple[int, ...]], list[Together]]()
    for item in alone:
        kinds.setdefault((_kind(item, layers_name), item.shape.d_in, item.shape.d_out), []).append(item)
    return [merged(members) for members in kinds.values()]


def across(alone: Sequence[Together], layers_name: str) -> list[Together]:
    """The same projection of neighbouring decoder layers together.

    As published, projections that share their input with others (q, k, v; gate, up) are grouped and all others (o,
    down) stay alone; where none shares its input, all are grouped. What neighbours do not have stays alone too.

    Args:
        alone: every linear layer by itself, in model order.
        layers_name: dotted name of the list of decoder layers.

    Raises:
        RecipeError: if the inputs of a projection differ in size between neighbours.
    """
    kinds = dict.fromkeys(_kind(item, layers_name) for item in alone)
    by_place = {(item.layer, item.shape.modules[0]): item for item in alone}
    siblings = [item for item in alone if len(item.sources[0].modules) > 1] or list(alone)
    shared = {_kind(item, layers_name) for item in siblings}
    order = {item.shape.modules[0]: number for number, item in enumerate(alone)}
    found = []
    layers = max(item.layer for item in alone) + 1
    for kind in kinds:
        for first in range(0, layers, LAYERS_TOGETHER):
            names = [(layer, f"{layers_name}.{layer}.{kind}") for layer in range(first, first + LAYERS_TOGETHER)]
            members = [by_place[place] for place in names if place in by_place]
            found += [merged(members)] if kind in shared and len(members) > 1 else members
    return sorted(found, key=lambda item: order[item.shape.modules[0]])


def merged(members: Sequence[Together]) -> Together:
    """One group of several.

    Raises:
        RecipeError: if their inputs differ in size.
    """
    first = members[0]
    for other in members[1:]:
        if other.shape.d_in != first.shape.d_in:
            raise RecipeError(
                f"{first.shape.modules[0]} and {other.shape.modules[0]} cannot share a dictionary: they read "
                f"{first.shape.d_in} and {other.shape.d_in} inputs; choose the grouping matrix or siblings"
            )
    modules = tuple(name for item in members for name in item.shape.modules)
    d_out = tuple(size for item in members for size in item.shape.d_out)
    read = tuple(item.sources[0] for item in members)
    return Together(GroupShape(modules, first.shape.d_in, d_out), read if len(set(read)) > 1 else read[:1])
