"""One file per published method: citation, formula, options. The mathematics is in `cospadi.solvers`."""

from cospadi.methods.base import GroupShape, Method, Problem, all_methods, get_method, method

__all__ = ["GroupShape", "Method", "Problem", "all_methods", "get_method", "method"]
