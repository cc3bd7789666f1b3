"""Text → token blocks → activation statistics (one Gram per input, streamed layer by layer)."""

from cospadi.calibration.blocks import TokenBlocks, encode, token_blocks
from cospadi.calibration.collect import collect, sequences_per_batch
from cospadi.calibration.fisher import fisher
from cospadi.calibration.loss_gram import LossGram, Weights, averaged, blended
from cospadi.calibration.statistics import Accumulator, Statistics, accumulate
from cospadi.calibration.store import StatisticsStore
from cospadi.calibration.texts import Texts, read_texts
from cospadi.calibration.token_weights import TokenWeights, token_weights

__all__ = [
    "Accumulator",
    "LossGram",
    "Statistics",
    "StatisticsStore",
    "Texts",
    "TokenBlocks",
    "TokenWeights",
    "Weights",
    "accumulate",
    "averaged",
    "blended",
    "collect",
    "encode",
    "fisher",
    "read_texts",
    "sequences_per_batch",
    "token_blocks",
    "token_weights",
]
