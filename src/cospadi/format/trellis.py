"""Trellis codes: each value of a tile is a level that a window of the tile's bits selects.

A tile is a circular stream of bits, K for each of its T values. The state of value t is the window of L bits that
begins at bit t·K; its level is a hash of the state whose distribution is about normal. Neighbouring windows overlap in
L − K bits, so that K bits a value reach the distortion of a code with 2^L levels; and since the stream is circular, a
tile needs no bits beside its own (QTIP, arXiv 2406.11235; the hash is the codebook "MUL1" of exllamav3).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

MOST_STATE = 16
TILE_VALUES = (64, 128, 256, 512, 1024)
RATES = (1, 2, 3, 4)
LEVEL_SIZE = 147.8
"""Standard deviation of the levels: about what a row's root mean square is divided by to get its scale."""

_MULTIPLIER = 0x83DCD12D
_CENTRE = 510  # four bytes of mean 127.5
_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}  # values decoded at a time: fitting the cache, and filling the device


@dataclass(frozen=True)
class Trellis:
    """How the values of a dense matrix are coded. The bits per value stand in the matrix's spec.

    Attributes:
        state: bits of a window, L.
        inputs: columns of a tile.
        outputs: rows of a tile.
    """

    state: int
    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int:
                raise ValueError(f"{name} of a trellis must be a whole number, not {value!r}")
        if not 1 <= self.state <= MOST_STATE:
            raise ValueError(f"a trellis of {self.state} state bits is not known, only 1 to {MOST_STATE}")
        if min(self.inputs, self.outputs) < 1 or self.values not in TILE_VALUES:
            raise ValueError(
                f"trellis tiles of {self.inputs} inputs x {self.outputs} outputs are not known, only tiles with a "
                f"power of two of values from {TILE_VALUES[0]} to {TILE_VALUES[-1]}"
            )

    @property
    def values(self) -> int:
        """Values of a tile, T."""
        return self.inputs * self.outputs

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles that cover a matrix, along its rows and its columns."""
        return -(-rows // self.outputs), -(-columns // self.inputs)

    def words(self, bits: int) -> int:
        """32-bit words of a tile with `bits` bits a value."""
        return self.values * bits // 32

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Trellis:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is anything else.
        """
        if not isinstance(data, dict) or set(data) != {"state", "inputs", "outputs"}:
            raise ValueError(f"a trellis has state, inputs and outputs, not {data!r}")
        return cls(**data)


_tables: dict[tuple[int, torch.device], Tensor] = {}


def level_table(state: int, device: torch.device | str = "cpu") -> Tensor:
    """The level of every state: integers from −510 to 510, of mean 0 and standard deviation 147.8 (at 16 bits).

    The level of s is the sum of the four bytes of 0x83DCD12D · s mod 2^32, minus 510.

    Args:
        state: bits of a state, L.
        device: of the table.

    Returns:
        (2^L,) float32. Shared by all callers: not to be changed.
    """
    device = torch.device(device)
    table = _tables.get((state, device))
    if table is not None:
        return table
    with torch.inference_mode(False):
        hashed = torch.arange(1 << state, dtype=torch.int64, device=device) * _MULTIPLIER
        of_bytes = (hashed.unsqueeze(-1) >> torch.arange(0, 32, 8, device=device)) & 0xFF
        table = (of_bytes.sum(-1) - _CENTRE).to(torch.float32)
    # what a fake mode or a graph that is being captured makes is not to outlive it
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(table) is Tensor and not captured:
        _tables[state, device] = table
    return table


def decode_tiles(words: Tensor, bits: int, state: int) -> Tensor:
    """The levels of some tiles.

    Args:
        words: int32 (tiles, T·bits/32).
        bits: per value, 1 to 4.
        state: bits of a window, L ≤ 16.

    Returns:
        (tiles, T) float32, integers.
    """
    following = torch.roll(words, -1, 1)
    # the stream from each byte on, of which the lowest 24 bits are used: a window begins at most 7 bits later
    from_byte = torch.stack(
        (words, words >> 8, ((words >> 16) & 0xFFFF) | (following << 16), ((words >> 24) & 0xFF) | (following << 8)), -1
    )
    count = words.shape[1] * 32 // bits
    if 8 % bits == 0:  # a byte begins 8 / bits values
        shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=words.device)
        states = from_byte.unsqueeze(-1) >> shifts
    else:  # `bits` bytes begin eight
        place = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=words.device)
        states = from_byte.view(len(words), -1, bits).index_select(-1, place // 8) >> (place % 8)
    states.bitwise_and_((1 << state) - 1)
    return level_table(state, words.device).index_select(0, states.view(-1)).view(len(words), count)


def decode_matrix(
    values: Tensor, scales: Tensor, rows: int, columns: int, bits: int, trellis: Trellis, dtype: torch.dtype
) -> Tensor:
    """The matrix that stored tiles and scales stand for.

    A value is its level times the scale of its row, computed in float32 (float64 where `dtype` is), then rounded to
    `dtype`: the same on every device. A bounded number of tiles is decoded at a time.

    Args:
        values: int32 (tiles along rows, tiles along columns, T·bits/32).
        scales: (rows, 1) float.
        rows: of the matrix.
        columns: of the matrix.
        bits: per value.
        trellis: the code.
        dtype: of the result.

    Returns:
        (rows, columns) `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down, across = trellis.tiles(rows, columns)
    out = torch.empty(rows, columns, dtype=dtype, device=values.device)
    step = max(1, _AT_ONCE.get(values.device.type, 1 << 18) // (across * trellis.values))
    for first in range(0, down, step):
        tiles = values[first : first + step]
        levels = decode_tiles(tiles.reshape(-1, tiles.shape[-1]), bits, trellis.state)
        levels = levels.view(len(tiles), across, trellis.outputs, trellis.inputs).transpose(1, 2)
        part = out[first * trellis.outputs : (first + step) * trellis.outputs]
        levels = levels.reshape(len(tiles) * trellis.outputs, -1)[: len(part), :columns]
        scale = scales[first * trellis.outputs : (first + step) * trellis.outputs].to(wide)
        part.copy_(levels.to(wide) * scale)
    return out
