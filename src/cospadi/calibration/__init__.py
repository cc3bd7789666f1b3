"""Text → token blocks → activation statistics (one Gram per input, streamed layer by layer)."""

from cospadi.calibration.blocks import TokenBlocks, encode, token_blocks
from cospadi.calibration.collect import collect, sequences_per_batch
from cospadi.calibration.fisher import fisher
from cospadi.calibration.statistics import Accumulator, Statistics, accumulate
from cospadi.calibration.store import StatisticsStore
from cospadi.calibration.texts import ACCEPTED, Texts, TextSource, described, read_texts, short_name

__all__ = [
    "ACCEPTED",
    "Accumulator",
    "Statistics",
    "StatisticsStore",
    "TextSource",
    "Texts",
    "TokenBlocks",
    "accumulate",
    "collect",
    "described",
    "encode",
    "fisher",
    "read_texts",
    "sequences_per_batch",
    "short_name",
    "token_blocks",
]
