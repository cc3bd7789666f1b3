"""Speed of compressed layers and whole models on this machine, beside dense ones and rivals of the same bytes."""

from cospadi.evaluation.speed.run import Settings, benchmark
from cospadi.evaluation.speed.shapes import SHAPES

__all__ = ["SHAPES", "Settings", "benchmark"]
