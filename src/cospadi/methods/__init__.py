"""One file per published method: citation, formula, options; the mathematics is in `cospadi.solvers`."""

from cospadi.methods.base import GroupShape, Method, Problem, all_methods, get_method, method

__all__ = ["GroupShape", "Method", "Problem", "all_methods", "get_method", "method"]
