import itertools

import pytest
import torch

from cospadi.format.pack import pack_bits
from cospadi.format.trellis import decode_tiles, level_table
from cospadi.solvers import trellis
from cospadi.solvers.trellis import decode, encode, spread, windows
from gram import rand

CODES = [(bits, state) for bits in (1, 2, 3, 4) for state in (8, 10)]


def cost(targets, symbols, bits, state, weights=1.0):
    return ((decode(symbols, bits, state) - targets).double().square() * weights).sum(-1)


def best_path(targets, weights, bits, state, around):
    """The two passes of the encoder for one tile, in plain Python and float64."""
    table, rest = level_table(state).double().tolist(), 2 ** (state - bits)

    def search(x, w, start, last):
        costs = [w[0] * (x[0] - level) ** 2 if start in (None, s) else float("inf") for s, level in enumerate(table)]
        history = []
        for t in range(1, len(x) + 1):
            back = [min(range(q << bits, (q + 1) << bits), key=costs.__getitem__) for q in range(rest)]
            history.append(back)
            if t == len(x):
                break
            costs = [costs[back[s % rest]] + w[t] * (x[t] - level) ** 2 for s, level in enumerate(table)]
        q = min(range(rest), key=lambda q: costs[back[q]]) if last is None else last % rest
        states = []
        for back in reversed(history):
            states.append(back[q])
            q = states[-1] % rest
        return states[::-1]

    x, w = targets.double().roll(around).tolist(), weights.double().roll(around).tolist()
    seam = search(x[: 2 * around], w[: 2 * around], None, None)[around]
    states = search(targets.double().tolist(), weights.double().tolist(), seam, seam)
    assert states[0] == seam
    return torch.tensor([s % 2**bits for s in states])


@pytest.mark.parametrize(("bits", "state"), [(1, 8), (2, 12), (3, 16), (3, 10), (4, 9), (4, 16)])
def test_states_are_windows_of_the_packed_circular_stream(bits, state):
    symbols = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(1))
    words = pack_bits(symbols, bits)
    for row, found in zip(words.tolist(), windows(symbols, bits, state).tolist(), strict=True):
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
        circle = stream | (stream << (64 * bits))
        assert found == [(circle >> (bits * t)) % 2**state for t in range(64)]


@pytest.mark.parametrize(("bits", "state"), [(1, 16), (2, 12), (3, 11), (4, 9)])
def test_levels_are_those_that_a_checkpoint_decodes_to(bits, state):
    symbols = torch.randint(2**bits, (5, 256), generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode(symbols, bits, state), decode_tiles(pack_bits(symbols, bits), bits, state))


@pytest.mark.parametrize(("bits", "state"), CODES)
def test_each_state_follows_from_the_one_before_and_one_symbol(bits, state):
    symbols = torch.randint(2**bits, (2, 128), generator=torch.Generator().manual_seed(2))
    states = windows(symbols, bits, state)
    following = states.roll(-1, -1)
    assert torch.equal(following % 2 ** (state - bits), states >> bits)
    assert torch.equal(states % 2**bits, symbols)


@pytest.mark.parametrize(("bits", "state"), [*CODES, (2, 9), (3, 11)])
def test_the_encoder_finds_the_best_path(bits, state):
    targets = 150 * rand(2, 64, seed=state)
    weights = rand(2, 64, seed=3).exp()
    found = encode(targets, bits, state)
    weighted = encode(targets, bits, state, weights)
    around = trellis.margin(bits, state, 64)
    for tile in range(2):
        expected = best_path(targets[tile], torch.ones(64), bits, state, around)
        assert cost(targets[tile], found[tile], bits, state) == cost(targets[tile], expected, bits, state)
        expected = best_path(targets[tile], weights[tile], bits, state, around)
        limit = cost(targets[tile], expected, bits, state, weights[tile])
        torch.testing.assert_close(cost(targets[tile], weighted[tile], bits, state, weights[tile]), limit)


def test_symbols_that_are_a_stream_are_found_again():
    for bits, state in CODES:
        symbols = torch.randint(2**bits, (5, 256), generator=torch.Generator().manual_seed(4))
        targets = decode(symbols, bits, state)
        assert torch.equal(decode(encode(targets, bits, state), bits, state), targets)


def test_tiles_do_not_depend_on_their_neighbours():
    targets = 150 * rand(trellis.batch_size(2, 10, 64) + 3, 64, seed=5)
    together = encode(targets, 2, 10)
    assert torch.equal(together[-3:], encode(targets[-3:], 2, 10))
    assert torch.equal(together, encode(targets, 2, 10))


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.30), (2, 0.081), (3, 0.023), (4, 0.0066)])
def test_distortion_of_gaussian_values(bits, limit):
    targets = rand(60, 256, seed=6) * spread(10)
    missed = cost(targets, encode(targets, bits, 10), bits, 10).sum() / targets.square().sum()
    assert 4**-bits < missed < limit


def test_longer_states_are_better():
    targets = rand(40, 256, seed=7)
    missed = [float(cost(targets * spread(s), encode(targets * spread(s), 2, s), 2, s).sum()) for s in (8, 10, 12)]
    missed = [value / spread(s) ** 2 for value, s in zip(missed, (8, 10, 12), strict=True)]
    assert missed[2] < 0.95 * missed[1] and missed[1] < 0.97 * missed[0]


def test_weights_move_bits_to_the_values_that_count():
    targets = rand(50, 256, seed=8) * spread(10)
    weights = (rand(50, 256, seed=9)).exp()
    plain, weighted = (cost(targets, encode(targets, 2, 10, w), 2, 10, weights).sum() for w in (None, weights))
    assert weighted < 0.7 * plain  # geometric over arithmetic mean: exp(−½) = .61


def test_values_without_weight_do_not_count():
    targets, weights = 150 * rand(4, 64, seed=10), torch.ones(4, 64)
    weights[:, 50:] = 0
    moved = targets.clone()
    moved[:, 50:] = 1e4
    assert torch.equal(encode(targets, 2, 8, weights), encode(moved, 2, 8, weights))
    assert torch.equal(encode(targets, 2, 8, 5 * weights), encode(targets, 2, 8, weights))
    encode(targets, 2, 8, 0 * weights)


def test_no_tiles():
    assert encode(torch.zeros(0, 64), 2, 8).shape == (0, 64)


@pytest.mark.parametrize(
    ("bits", "state", "size", "word"),
    [(5, 12, 64, "5 bits"), (2, 7, 64, "states of 7"), (2, 17, 64, "states of 17"), (2, 8, 96, "tile of 96")],
)
def test_unknown_codes_are_refused(bits, state, size, word):
    with pytest.raises(ValueError, match=word):
        encode(torch.zeros(1, size), bits, state)


def test_bad_numbers_are_refused():
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not all finite"):
            encode(torch.full((1, 64), bad), 2, 8)
    for bad in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match="weights"):
            encode(torch.zeros(1, 64), 2, 8, torch.full((1, 64), bad))


def test_every_batch_fits_the_memory():
    for bits, state, size in itertools.product((1, 2, 3, 4), range(8, 17), (64, 256)):
        count = trellis.batch_size(bits, state, size)
        assert count == 1 or 4 * count * size * 2 ** (state - bits) <= trellis.MEMORY
