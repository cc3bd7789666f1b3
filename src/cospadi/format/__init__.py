"""The stored form of a compressed linear layer: specs, sparsity patterns, packing. Imports no solver."""

from cospadi.format.pack import Packed, pack, unpack
from cospadi.format.schema import FORMAT_VERSION, Factors, GroupSpec, MatrixSpec, Stored

__all__ = ["FORMAT_VERSION", "Factors", "GroupSpec", "MatrixSpec", "Packed", "Stored", "pack", "unpack"]
