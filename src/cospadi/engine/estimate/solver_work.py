"""The work of every method's solver on one group, as the method declares it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cospadi.format import GroupSpec, Spec
from cospadi.methods import get_method
from cospadi.methods.cost import Sizes, Work, measuring


def solver_work(spec: Spec, options: Mapping[str, Any]) -> Work | None:
    """What it takes to factorise one group and to measure what was stored; None: unknown.

    Args:
        spec: of the group.
        options: of its method; defaults are filled in.
    """
    work = get_method(spec.method).work(spec, dict(options))
    if work is None or not isinstance(spec, GroupSpec):
        return work
    return work + measuring(Sizes.of(spec))
