"""Trellis codes: K bits a value, decoded from a sliding window of L bits, found by the Viterbi algorithm.

T values share a circular stream of T·K bits. The window of value t, its *state*, is the L bits that begin at bit t·K,
and a fixed hash turns the state into a level. Windows overlap, so the encoder looks for the best path through a graph:
state s is followed by the 2^K states (s >> K) | (new bits << (L − K)). The stream is circular ("tail-biting"), so
nothing but the bits has to be stored, and any value can be decoded alone. QTIP (arXiv 2406.11235) brought such codes
to weights.

At two bits a value the squared error of Gaussian values is about .07 of their variance, against .119 for the best
uniform levels and .0625 for the bound of rate-distortion theory.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cospadi.format.trellis import level_table

Search = Callable[[Tensor, Tensor | None, int, int, int], Tensor]

MARGIN = 10
"""Constraint lengths of L / K values on either side of the seam that decide about the state there."""
MEMORY = 2**28
"""Bytes of path costs that a batch of tiles may keep."""


@cache
def spread(state: int) -> float:
    """Standard deviation of the levels of all states."""
    return float(level_table(state).double().std(correction=0))


def windows(symbols: Tensor, bits: int, state: int) -> Tensor:
    """States of the values of circular streams: Σ_j symbol[(t + j) mod T] << (K·j), mod 2^L.

    Args:
        symbols: integer (…, T), each less than 2^K.
        bits: K.
        state: L.

    Returns:
        int64 (…, T).
    """
    places = -(-state // bits)
    circular = torch.cat([symbols, symbols[..., : places - 1]], -1).to(torch.int64)
    factors = torch.arange(places, device=symbols.device) * bits
    return (circular.unfold(-1, places, 1) << factors).sum(-1).bitwise_and_(2**state - 1)


def decode(symbols: Tensor, bits: int, state: int) -> Tensor:
    """Levels float32 (…, T) of the symbols (…, T) of circular streams."""
    return level_table(state, symbols.device)[windows(symbols, bits, state)]


def check_code(bits: int, state: int, size: int) -> None:
    """Refuse a code that no reader knows.

    Raises:
        ValueError: unless 1 ≤ K ≤ 4, 8 ≤ L ≤ 16 and T is a power of two of at least 64.
    """
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"trellis codes of {bits} bits a value are not supported, only 1 to 4")
    if not 8 <= state <= 16:
        raise ValueError(f"trellis states of {state} bits are not supported, only 8 to 16")
    if size < 64 or size & (size - 1):
        raise ValueError(f"a trellis tile of {size} values is not supported: it must be a power of two of at least 64")


def encode(targets: Tensor, bits: int, state: int, weights: Tensor | None = None) -> Tensor:
    """The circular streams whose levels are closest to the targets.

    Of all streams that pass the seam, where the circle is cut, in a given state, the one found is the best. That state
    is taken from the best path through the values on either side of the seam.

    Weights let the values of a tile share its bits: at a fixed rate the sum of weighted errors is in proportion to the
    geometric mean of the weights, no longer to their arithmetic mean.

    Args:
        targets: float (tiles, T), in units of levels.
        bits: K, 1 to 4 bits a value.
        state: L, 8 to 16 bits a state.
        weights: (tiles, T) of the squared errors, not negative; None: all equal. Only ratios within a tile count.
            Values of weight 0 may become anything.

    Returns:
        uint8 (tiles, T) symbols of K bits.

    Raises:
        ValueError: if the code is not supported, a target is not finite or a weight is negative or not finite.
    """
    check_code(bits, state, targets.shape[1])
    targets = targets.float()
    if not bool(torch.isfinite(targets).all()):
        raise ValueError("the values to encode are not all finite")
    if weights is not None and not bool(torch.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("the weights of errors must be finite and not negative")
    return encode_finite(targets, bits, state, weights)


def encode_finite(targets: Tensor, bits: int, state: int, weights: Tensor | None = None) -> Tensor:
    """:func:`encode` without its checks, for which the host would have to wait for the device."""
    roots = None
    if weights is not None:
        largest = weights.amax(1, keepdim=True)
        roots = (weights / torch.where(largest > 0, largest, 1.0)).sqrt().float()
    search = _kernel(targets.device) or _search
    return search(targets.float(), roots, bits, state, margin(bits, state, targets.shape[1]))


def _kernel(device: torch.device) -> Search | None:
    """The search in one kernel, or None where it does not run."""
    if device.type != "cuda":
        return None
    try:
        from cospadi.solvers.triton_trellis import encode_tiles, runs_on
    except ImportError:
        return None
    return encode_tiles if runs_on(device) else None


def margin(bits: int, state: int, size: int) -> int:
    """Values on either side of the seam that decide about the state there, at most half a tile."""
    return min(size // 2, -(-MARGIN * state // bits))


def batch_size(bits: int, state: int, size: int) -> int:
    """Tiles encoded side by side: their costs stay in the cache and their path costs within `MEMORY`."""
    fast = min(max(2**18 >> state, 16), 256)
    return max(1, min(fast, MEMORY // (4 * size << (state - bits))))


def _search(targets: Tensor, roots: Tensor | None, bits: int, state: int, around: int) -> Tensor:
    """:func:`encode` in PyTorch, with the tiles in the last dimension of all arrays.

    Args:
        targets: float32 (tiles, T).
        roots: of the weights, (tiles, T); None: all 1.
        bits: K.
        state: L.
        around: values on either side of the seam that decide about the state there.
    """
    tiles, size = targets.shape
    count = min(batch_size(bits, state, size), max(tiles, 1))
    work = _Work(level_table(state, targets.device), 2**bits, size, count)
    symbols = torch.empty(tiles, size, dtype=torch.uint8, device=targets.device)
    for begin in range(0, tiles, count):
        chunk = targets[begin : begin + count].T.contiguous()
        root = None if roots is None else roots[begin : begin + count].T.contiguous()
        work.narrow(chunk.shape[1])
        near = chunk.roll(around, 0)[: 2 * around]
        near_root = None if root is None else root.roll(around, 0)[: 2 * around]
        work.forward(near, near_root, None)
        seam = work.backward(near, near_root, work.paths[len(near) - 1].argmin(0), around)[0]
        work.forward(chunk, root, seam)
        states = work.backward(chunk, root, seam, 1)
        symbols[begin : begin + count] = (torch.cat([seam[None], states]) & (2**bits - 1)).T
    return symbols


class _Work:
    """The arrays of a search, used again for every batch of tiles.

    Args:
        table: (2^L,) levels.
        low: 2^K.
        size: T.
        count: most tiles of a batch.

    Attributes:
        paths: (T, 2^(L−K), tiles); paths[t, q] is the least cost of the values up to t over all paths whose next state
            has q as its low bits, which are the high bits of the state at t.
    """

    def __init__(self, table: Tensor, low: int, size: int, count: int) -> None:
        self.table, self.size, self.rest = table, size, len(table) // low
        self.lows = torch.arange(low, device=table.device)[:, None]
        self._costs = torch.empty(len(table) * count, device=table.device)
        self._paths = torch.empty(size * self.rest * count, device=table.device)

    def narrow(self, count: int) -> None:
        """Lay the arrays out for a number of tiles."""
        self.costs = self._costs[: len(self.table) * count].view(-1, count)
        self.paths = self._paths[: self.size * self.rest * count].view(self.size, self.rest, count)

    def forward(self, targets: Tensor, roots: Tensor | None, start: Tensor | None) -> None:
        """Least costs of all paths, step by step.

        Args:
            targets: (steps, tiles).
            roots: of the weights, (steps, tiles); None: all 1.
            start: (tiles,) the only state allowed at step 0; None: any.
        """
        costs, low, count = self.costs, len(self.lows), targets.shape[1]
        after, before = costs.view(low, self.rest, count), costs.view(self.rest, low, count)
        for step in range(len(targets)):
            torch.sub(self.table[:, None], targets[step], out=costs)
            if roots is not None:
                costs.mul_(roots[step])
            if step:
                torch.addcmul(self.paths[step - 1], after, after, out=after)
            else:
                costs.square_()
                if start is not None:
                    only = costs.gather(0, start[None])
                    costs.fill_(torch.inf).scatter_(0, start[None], only)
            best = torch.minimum(before[:, 0], before[:, 1], out=self.paths[step])
            for place in range(2, low):
                torch.minimum(best, before[:, place], out=best)

    def backward(self, targets: Tensor, roots: Tensor | None, following: Tensor, stop: int) -> Tensor:
        """The states (steps − stop, tiles) of the best paths after whose last step comes the state `following`."""
        states = []
        for step in reversed(range(stop, len(targets))):
            choices = (following & (self.rest - 1)) * len(self.lows) + self.lows
            missed = self.table[choices] - targets[step]
            costs = (missed if roots is None else missed * roots[step]).square()
            if step:
                costs += self.paths[step - 1].gather(0, choices & (self.rest - 1))
            following = choices.gather(0, costs.argmin(0, keepdim=True))[0]
            states.append(following)
        return torch.stack(states[::-1])
