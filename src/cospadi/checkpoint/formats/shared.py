"""``cospadi_masa``: linear layers that are combinations of matrix atoms shared across layers (docs/format.md).

The description lists groups as in :meth:`~cospadi.format.SharedSpec.to_dict`. With ``"compose": true``
beside them, whoever loads the checkpoint gets dense layers. The tensors are those of
:class:`~cospadi.layers.shared_linear.SharedLinear`, by their parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cospadi.checkpoint.formats.base import FORMATS
from cospadi.checkpoint.formats.grouped import GroupedFormat
from cospadi.format import SharedSpec
from cospadi.layers.shared_linear import SharedLinear


class SharedFormat(GroupedFormat[SharedSpec]):
    """Atoms, coefficients and low-rank parts as 16-bit floats."""

    name = "cospadi_masa"
    spec_type = SharedSpec
    layer_type = SharedLinear
    keys = frozenset({"groups", "compose"})

    def normalised(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Format.normalised`."""
        return {key: value for key, value in data.items() if key != "compose"} | (
            {"compose": True} if data.get("compose") else {}
        )

    def part(self, spec: SharedSpec, kept: Sequence[int]) -> SharedSpec:
        """Fewer layers with the same atoms, if more layers than atoms stay. See :meth:`Format.part`."""
        if kept[0] != 0 or (not spec.whole and spec.atoms >= len(kept)):
            return super().part(spec, kept)
        modules = tuple(spec.modules[index] for index in kept)
        ranks = tuple(spec.ranks[index] for index in kept)
        return replace(spec, modules=modules, ranks=ranks, atoms=len(kept) if spec.whole else spec.atoms)

    def bound(self, specs: Sequence[SharedSpec]) -> dict[str, Any]:
        """The description if every module came to be a group of its own; see :meth:`Format.bound`."""
        alone = [SharedSpec((m,), s.d_in, s.d_out, 0, (min(s.d_in, s.d_out),)) for s in specs for m in s.modules]
        return self.describe(alone)

    def bound_names(self, specs: Sequence[SharedSpec]) -> list[str]:
        """All tensors that any grouping and any ranks may need; see :meth:`Format.bound_names`."""
        leaves = ("atoms", "coefficients", "down", "up")
        return [f"{module}.{leaf}" for spec in specs for module in spec.modules for leaf in leaves]


SHARED = FORMATS.add(SharedFormat.name, SharedFormat())
