"""Speed of compressed layers and models on this machine, compared with dense ones and with rivals of equal size."""

from cospadi.evaluation.speed.run import Settings, run_benchmark
from cospadi.evaluation.speed.shapes import SHAPES

__all__ = ["SHAPES", "Settings", "run_benchmark"]
