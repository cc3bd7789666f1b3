"""Which Triton kernels, with which launch parameters, may compute a product.

The functions that launch them are in `launch_sparse` and `launch_dense`; this module offers them too. Importing it
needs Triton.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cospadi.format import MatrixSpec, Packed
from cospadi.kernels.triton.launch_common import Config, per_word, pitch
from cospadi.kernels.triton.launch_common import readable as readable_words
from cospadi.kernels.triton.launch_dense import dense, expand_integers, few_tokens, one_token, one_token_fits, span
from cospadi.kernels.triton.launch_sparse import balanced, balanced_fits, expand, pitched, sparse, unit, walk
from cospadi.kernels.triton.launch_trellis import MOST_TOKENS as MOST_TRELLIS_TOKENS
from cospadi.kernels.triton.launch_trellis import expand_trellis, trellis, trellis_fits

__all__ = [
    "Config", "balanced", "balanced_fits", "dense", "expand", "expand_integers", "expand_trellis", "few_tokens",
    "handed_on", "one_token", "one_token_fits", "options", "per_word", "pitch", "pitched", "readable", "span", "sparse",
    "trellis", "trellis_fits", "unit", "unpacked", "walk",
]  # fmt: skip

MOST_TOKENS = 64  # that the decode kernels take

# Launch parameters worth trying, the most promising first (measured on an H100 and an H200 on shapes of an 8B model).
# At most five per product, since the first call of a shape compiles and times them all. Small matrices need many words
# per row to fill the device; large ones run faster with few.
BALANCED = (Config(8, 4, 1), Config(4, 8, 1), Config(4, 32, 4))
BALANCED_ONE = (Config(4, 8, 1), Config(4, 32, 4))
WALK = (Config(8, 4, 1), Config(4, 8, 1), Config(4, 32, 4))
SPARSE_ONE = (Config(8, 4, 1, 8), Config(8, 8, 2, 8), Config(8, 1, 2, 8))
SPARSE_MANY = (Config(64, 4, 4, 8), Config(16, 4, 1, 8))
DENSE_ONE = (Config(4, 1024, 4), Config(2, 1024, 2))
DENSE_ONE_PACKED = (Config(4, 256, 4), Config(4, 512, 4))  # elements are 32-bit words
DENSE_MANY = (Config(16, 256, 2, stages=4), Config(32, 128, 4, stages=4))
DENSE_MANY_PACKED = (Config(32, 64, 4), Config(16, 32, 2, stages=4))
ONE_TOKEN = (Config(8, 32, 4), Config(4, 64, 4), Config(8, 64, 4))  # width in chunks of 16 bytes
FEW_TOKENS = (Config(32, 4, 4, stages=3), Config(16, 4, 4, stages=3), Config(16, 8, 8, stages=2))  # width in spans
TRELLIS = (Config(1, 16, 4), Config(1, 8, 4), Config(1, 32, 8), Config(1, 8, 2))  # width in tiles
EXPAND = Config(2, 16, 1)
EXPAND_INTEGERS = Config(2, 1024, 4)  # width in columns


Option = tuple[Callable[..., Tensor], Config]


def options(spec: MatrixSpec, tokens: int) -> list[Option]:
    """Kernels and launch parameters that compute ``x Mᵀ`` for a spec and number of tokens, the most promising first."""
    if spec.trellis is not None:
        return [(trellis, config) for config in TRELLIS] if tokens <= MOST_TRELLIS_TOKENS else []
    if not spec.sparse:
        bytes_ = spec.bits == 16 or spec.signed_bytes
        if tokens == 1:
            chosen: list[Option] = [(one_token, config) for config in ONE_TOKEN] if one_token_fits(spec) else []
            rest = DENSE_ONE if bytes_ else DENSE_ONE_PACKED
        else:
            chosen = [(few_tokens, config) for config in FEW_TOKENS] if span(spec) else []
            rest = DENSE_MANY if bytes_ else DENSE_MANY_PACKED
        return [*chosen, *((dense, config) for config in (rest[:1] if chosen else rest))]
    if balanced_fits(spec) and tokens == 1:
        (large, small), leaner = BALANCED_ONE, [(walk, config) for config in WALK]
        return [(balanced, large), *leaner, (balanced, small)]
    if balanced_fits(spec) and tokens <= 16:
        return [(balanced, config) for config in BALANCED]
    return [(sparse, config) for config in (SPARSE_ONE if tokens == 1 else SPARSE_MANY)]


def readable(spec: MatrixSpec) -> bool:
    """Whether a kernel reads this spec."""
    return readable_words(spec) if spec.trellis is None else trellis_fits(spec)


def handed_on(
    spec: MatrixSpec, tokens: int, reader: MatrixSpec | None, dtype: torch.dtype
) -> tuple[torch.dtype, dict[str, bool]]:
    """The dtype and layout (as kernel options) in which the outputs of a matrix are handed to the codes `reader`."""
    if reader is None or tokens != 1 or not reader.sparse or not readable(reader):
        return dtype, {}
    return torch.float32, {"spaced": True} if balanced_fits(reader) and not spec.sparse else {}


def unpacked(packed: Packed, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
    """Unpack a :func:`readable` matrix, unless it is 16-bit dense, to (rows, columns) in `dtype`."""
    if spec.trellis is not None:
        return expand_trellis(packed, spec, dtype)
    if spec.sparse:
        return expand(packed, spec, dtype, EXPAND)
    return expand_integers(packed, spec, dtype, EXPAND_INTEGERS)
