"""The stored form of compressed linear layers: specs, sparsity patterns, packing. Imports no solver."""

from cospadi.format.group import Factors, GroupSpec, part_of, split_codes, split_packed
from cospadi.format.pack import Packed, pack, unpack
from cospadi.format.rotation import Rotation, StoredRotation
from cospadi.format.schema import FORMAT_VERSION, MatrixSpec, Stored
from cospadi.format.shared import SharedFactors, SharedSpec
from cospadi.format.spec import GroupShape, PackedGroup, Solution, Spec
from cospadi.format.trellis import Trellis

__all__ = [
    "FORMAT_VERSION",
    "Factors",
    "GroupShape",
    "GroupSpec",
    "MatrixSpec",
    "Packed",
    "PackedGroup",
    "Rotation",
    "SharedFactors",
    "SharedSpec",
    "Solution",
    "Spec",
    "Stored",
    "StoredRotation",
    "Trellis",
    "pack",
    "part_of",
    "split_codes",
    "split_packed",
    "unpack",
]
