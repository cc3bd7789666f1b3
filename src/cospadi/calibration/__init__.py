"""Text → token blocks → activation statistics (one Gram per input, streamed layer by layer)."""

from cospadi.calibration.blocks import TokenBlocks, encode, token_blocks
from cospadi.calibration.collect import collect, sequences_per_batch
from cospadi.calibration.fisher import fisher
from cospadi.calibration.statistics import Accumulator, Statistics, accumulate
from cospadi.calibration.store import StatisticsStore
from cospadi.calibration.texts import Texts, read_texts

__all__ = [
    "Accumulator",
    "Statistics",
    "StatisticsStore",
    "Texts",
    "TokenBlocks",
    "accumulate",
    "collect",
    "encode",
    "fisher",
    "read_texts",
    "sequences_per_batch",
    "token_blocks",
]
