"""One file per published method: citation, formula, options. The mathematics is in `cospadi.solvers`."""

from cospadi.format import GroupShape
from cospadi.methods.base import METHODS, Method, Problem, all_methods, get_method, method, refuse_decided

__all__ = [
    "METHODS",
    "GroupShape",
    "Method",
    "Problem",
    "all_methods",
    "get_method",
    "method",
    "refuse_decided",
]
