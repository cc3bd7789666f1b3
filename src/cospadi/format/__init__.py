"""The stored form of compressed linear layers: specs, sparsity patterns, packing. Imports no solver."""

from cospadi.format.group import Factors, GroupSpec, split_packed
from cospadi.format.pack import Packed, pack, unpack
from cospadi.format.schema import FORMAT_VERSION, MatrixSpec, Stored
from cospadi.format.shared import SharedFactors, SharedSpec
from cospadi.format.spec import GroupShape, PackedGroup, Solution, Spec

__all__ = [
    "FORMAT_VERSION",
    "Factors",
    "GroupShape",
    "GroupSpec",
    "MatrixSpec",
    "Packed",
    "PackedGroup",
    "SharedFactors",
    "SharedSpec",
    "Solution",
    "Spec",
    "Stored",
    "pack",
    "split_packed",
    "unpack",
]
