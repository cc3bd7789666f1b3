"""Structured pruning without retraining: remove whole decoder layers (``depth``) or part of their width (``width``).

A pruning method reads :class:`Evidence` (the model, calibration text and statistics shared between methods) and returns
an :class:`Edit`; see :mod:`cospadi.pruning.base`.

Names are imported on first use, because the hooks that let transformers read pruned checkpoints can import this package
while transformers itself is only partly imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.pruning.base import (
        PRUNING,
        Edit,
        PruningMethod,
        all_pruning_methods,
        block_bytes,
        get_pruning_method,
        pruning_method,
    )
    from cospadi.pruning.depth.surgery import Cut, without_blocks
    from cospadi.pruning.evidence import Evidence, Tokens

__all__ = [
    "PRUNING",
    "Cut",
    "Edit",
    "Evidence",
    "PruningMethod",
    "Tokens",
    "all_pruning_methods",
    "block_bytes",
    "get_pruning_method",
    "pruning_method",
    "without_blocks",
]

_HOMES = {
    "PRUNING": "base",
    "Cut": "depth.surgery",
    "Edit": "base",
    "Evidence": "evidence",
    "PruningMethod": "base",
    "Tokens": "evidence",
    "all_pruning_methods": "base",
    "block_bytes": "base",
    "get_pruning_method": "base",
    "pruning_method": "base",
    "without_blocks": "depth.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cospadi.pruning' has no attribute {name!r}")
    return getattr(import_module(f"cospadi.pruning.{_HOMES[name]}"), name)
