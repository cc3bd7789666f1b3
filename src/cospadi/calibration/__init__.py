"""Text → token blocks → activation statistics (one Gram per input, streamed layer by layer)."""

from cospadi.calibration.blocks import TokenBlocks, encode, token_blocks
from cospadi.calibration.collect import collect, sequences_per_batch
from cospadi.calibration.fisher import fisher
from cospadi.calibration.loss_gram import LossGram, Weights, averaged, blended
from cospadi.calibration.statistics import Accumulator, Statistics, accumulate
from cospadi.calibration.store import StatisticsStore
from cospadi.calibration.texts import ACCEPTED, Texts, TextSource, described, read_texts, short_name
from cospadi.calibration.token_weights import TokenWeights, token_weights

__all__ = [
    "ACCEPTED",
    "Accumulator",
    "LossGram",
    "Statistics",
    "StatisticsStore",
    "TextSource",
    "Texts",
    "TokenBlocks",
    "TokenWeights",
    "Weights",
    "accumulate",
    "averaged",
    "blended",
    "collect",
    "described",
    "encode",
    "fisher",
    "read_texts",
    "sequences_per_batch",
    "short_name",
    "token_blocks",
    "token_weights",
]
