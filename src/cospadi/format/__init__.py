"""The stored form of a compressed linear layer: what is kept, in how many bits, in which tensors."""

from cospadi.format.pack import Packed, pack, unpack
from cospadi.format.schema import FORMAT_VERSION, Factors, GroupSpec, MatrixSpec, Stored

__all__ = ["FORMAT_VERSION", "Factors", "GroupSpec", "MatrixSpec", "Packed", "Stored", "pack", "unpack"]
