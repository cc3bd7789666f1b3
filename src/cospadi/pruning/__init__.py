"""Removing whole decoder layers (blocks), or a share of their width, without retraining.

Names are loaded on first use: what lets transformers read pruned checkpoints lies in this package too, and may be
imported while transformers itself is only half imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.pruning.base import DepthMethod, Edit, all_depth_methods, block_bytes, depth_method, get_depth_method
    from cospadi.pruning.depth.surgery import Cut, without_blocks
    from cospadi.pruning.evidence import Evidence, Tokens

__all__ = [
    "Cut",
    "DepthMethod",
    "Edit",
    "Evidence",
    "Tokens",
    "all_depth_methods",
    "block_bytes",
    "depth_method",
    "get_depth_method",
    "without_blocks",
]

_HOMES = {
    "Cut": "depth.surgery",
    "DepthMethod": "base",
    "Edit": "base",
    "Evidence": "evidence",
    "Tokens": "evidence",
    "all_depth_methods": "base",
    "block_bytes": "base",
    "depth_method": "base",
    "get_depth_method": "base",
    "without_blocks": "depth.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cospadi.pruning' has no attribute {name!r}")
    return getattr(import_module(f"cospadi.pruning.{_HOMES[name]}"), name)
