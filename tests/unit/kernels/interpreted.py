"""The Triton kernels on CPU, in Triton's interpreter, against float64.

Run by test_interpreted.py in a process of its own, with TRITON_INTERPRET=1 from the start.
"""

import os

import pytest
import torch

from cospadi.format import MatrixSpec, Trellis, unpack
from cospadi.kernels import autotune as tuning
from cospadi.kernels import cuda
from cospadi.kernels.synthetic import random_packed
from cospadi.kernels.triton import launch

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"


def inputs(tokens, columns, dtype=torch.float16):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(5)).to(dtype)


def check(y, x, packed, spec, limit=3e-3):
    exact = x.double() @ unpack(packed, spec, torch.float64).T
    assert y.shape == exact.shape
    assert float((y.double() - exact).norm() / exact.norm()) < limit


SPARSE = [
    ("free", 31, 16, 0),
    ("free", 9, 8, 0),
    ("free", 70, 4, 8),
    ("16:32", 0, 16, 0),
    ("5:8", 0, 8, 8),
    ("3:4", 0, 2, 0),
    ("11:16", 0, 4, 0),
]


@pytest.mark.parametrize("kind", SPARSE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_sparse_rows_of_any_pattern(kind, tokens):
    pattern, nonzeros, bits, group = kind
    spec = MatrixSpec(21, 109, pattern, nonzeros, bits, group)
    packed = random_packed(spec, torch.float16)
    x = inputs(tokens, 109)
    y = launch.sparse(x, packed, spec, launch.Config(8, 2, 4, 8), torch.float16)
    check(y, x, packed, spec)


@pytest.mark.parametrize("lanes", [4, 16, 32])
@pytest.mark.parametrize("pattern", ["free", "6:16"])
def test_lanes_and_words_of_a_tile_do_not_matter(lanes, pattern):
    spec = MatrixSpec(5, 200, pattern, 75, 16)
    packed = random_packed(spec, torch.float32)
    x = inputs(1, 200, torch.float32)
    for words in (1, 4):
        y = launch.sparse(x, packed, spec, launch.Config(4, words, 4, lanes), torch.float32)
        check(y, x, packed, spec, 1e-6)


BALANCED = [("16:32", 16, 0), ("2:4", 16, 0), ("4:32", 16, 0), ("3:8", 16, 0), ("8:16", 8, 0), ("8:32", 8, 8)]
BALANCED += [("16:32", 4, 0), ("2:4", 4, 16), ("16:16", 2, 0)]
# values of a mask word that fill whole 32-bit units only: the default pattern with 8 bits among them
BALANCED += [("12:32", 8, 0), ("12:32", 8, 64), ("8:32", 4, 8), ("2:4", 2, 16), ("2:32", 16, 0), ("6:32", 16, 0)]


@pytest.mark.parametrize("kind", BALANCED, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_balanced_rows(kind, tokens):
    pattern, bits, group = kind
    spec = MatrixSpec(9, 96, pattern, 0, bits, group)
    assert launch.balanced_fits(spec)
    packed = random_packed(spec, torch.float16)
    x = inputs(tokens, 96)
    y = launch.balanced(x, packed, spec, launch.Config(8, 2, 4), torch.float16)
    check(y, x, packed, spec)
    if tokens == 1 and pattern == "16:32":
        z = launch.pitched(x)
        check(launch.balanced(z, packed, spec, launch.Config(4, 4, 4), torch.float16), x, packed, spec)


def test_balanced_rows_of_many_tokens():
    spec = MatrixSpec(9, 64, "4:8", 0, 8)
    packed = random_packed(spec, torch.float16)
    for tokens in (8, 11):
        x = inputs(tokens, 64)
        check(launch.balanced(x, packed, spec, launch.Config(8, 2, 4), torch.float16), x, packed, spec)


def test_what_the_balanced_kernel_refuses():
    for spec in (
        MatrixSpec(4, 160, "free", 80),
        MatrixSpec(4, 150, "16:32"),
        MatrixSpec(4, 160, "3:32"),
        MatrixSpec(4, 160, "16:32", 0, 8, 12),
        MatrixSpec(4, 160, "12:32", 0, 8, 6),
        MatrixSpec(4, 160, "12:32", 0, 4),
        MatrixSpec(4, 160, "16:32", 0, 4, symmetric=False),
        MatrixSpec(4, 160, "16:32", 0, 14),
        MatrixSpec(4, 160),
    ):
        assert not launch.balanced_fits(spec)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("scales", [(0, True), (16, True), (7, False), (0, False)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_dense_rows(bits, scales, tokens):
    group, symmetric = scales
    if bits == 16 and (group or not symmetric):
        pytest.skip("16-bit values have no scales")
    spec = MatrixSpec(21, 109, bits=bits, group=group, symmetric=symmetric)
    packed = random_packed(spec, torch.float16)
    x = inputs(tokens, 109)
    check(launch.dense(x, packed, spec, launch.Config(16, 32, 4), torch.float32), x, packed, spec)


def test_spaced_outputs():
    spec = MatrixSpec(64, 50, bits=8)
    packed = random_packed(spec, torch.float16)
    x = inputs(1, 50)
    config = launch.Config(4, 32, 4)
    plain = launch.dense(x, packed, spec, config, torch.float32)
    spaced = launch.dense(x, packed, spec, config, torch.float32, spaced=True)
    assert torch.equal(spaced[:, :, :32], launch.pitched(plain)[:, :, :32])


@pytest.mark.parametrize("kind", SPARSE, ids=str)
def test_expanding(kind):
    pattern, nonzeros, bits, group = kind
    spec = MatrixSpec(21, 109, pattern, nonzeros, bits, group)
    packed = random_packed(spec, torch.float32)
    dense = launch.expand(packed, spec, torch.float32, launch.Config(8, 2, 4))
    assert torch.allclose(dense, unpack(packed, spec, torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [*SPARSE, ("dense", 0, 4, 16), ("dense", 0, 16, 0)], ids=str)
def test_every_spec_has_options_that_agree(kind):
    pattern, nonzeros, bits, group = kind
    spec = MatrixSpec(21, 128, pattern, nonzeros, bits, group)
    packed = random_packed(spec, torch.float16)
    for tokens in (1, 4):
        x = inputs(tokens, 128)
        options = launch.options(spec, tokens)
        assert options
        for kernel, config in (options[0], options[-1]):
            check(kernel(x, packed, spec, config, torch.float16), x, packed, spec)


TOKENS = (2, 3, 4, 7, 16)
# bits, group, symmetric, columns: whole chunks of 16 bytes, a tile that lacks some, groups of one and of many
CHUNKED = [(8, 0, True, 48), (8, 16, True, 208), (8, 64, True, 144), (8, 48, False, 80), (4, 32, True, 160)]
CHUNKED += [(4, 64, False, 96), (2, 0, False, 128), (2, 64, True, 192), (8, 0, False, 16)]


@pytest.mark.parametrize("turn", range(len(CHUNKED)))
def test_integers_of_one_token(turn):
    dtype = (torch.float16, torch.bfloat16)[turn % 2]
    bits, group, symmetric, columns = CHUNKED[turn]
    spec = MatrixSpec(21, columns, bits=bits, group=group, symmetric=symmetric)
    assert launch.one_token_fits(spec)
    packed, x = random_packed(spec, dtype), inputs(1, columns, dtype)
    check(launch.one_token(x, packed, spec, launch.Config(8, 8, 4), torch.float32), x, packed, spec, 1e-5)
    check(launch.one_token(x, packed, spec, launch.Config(4, 2, 4), torch.float32), x, packed, spec, 1e-5)


def test_what_the_kernel_of_one_token_refuses():
    for spec in (
        MatrixSpec(4, 100, bits=8),
        MatrixSpec(4, 96, bits=8, group=24),
        MatrixSpec(4, 96, bits=4, group=16),
        MatrixSpec(4, 96, bits=16),
        MatrixSpec(4, 96, bits=3),
        MatrixSpec(4, 96, "8:32", 0, 8),
    ):
        assert not launch.one_token_fits(spec)


def test_one_token_spaced_and_from_an_odd_address():
    spec = MatrixSpec(64, 96, bits=8, group=32)
    packed = random_packed(spec, torch.float16)
    x = inputs(1, 97)[:, 1:]
    config = launch.Config(4, 4, 4)
    plain = launch.one_token(x, packed, spec, config, torch.float32)
    check(plain, x, packed, spec, 1e-5)
    spaced = launch.one_token(x, packed, spec, config, torch.float32, spaced=True)
    assert torch.equal(spaced[:, :, :32], launch.pitched(plain)[:, :, :32])


SPANNED = [(8, 0, True, 109), (8, 16, True, 50), (8, 64, True, 200), (8, 96, True, 230), (8, 128, False, 150)]
SPANNED += [(8, 0, False, 33), (4, 64, True, 109), (4, 16, False, 77), (2, 32, True, 109), (2, 0, False, 40)]


@pytest.mark.parametrize("turn", range(len(SPANNED)))
def test_integers_of_a_few_tokens(turn):
    kind, tokens = SPANNED[turn], TOKENS[turn % len(TOKENS)]
    bits, group, symmetric, columns = kind
    spec = MatrixSpec(21, columns, bits=bits, group=group, symmetric=symmetric)
    assert launch.span(spec)
    packed, x = random_packed(spec, torch.float16), inputs(tokens, columns)
    spans = 2 if tokens % 2 else 4
    check(launch.few_tokens(x, packed, spec, launch.Config(16, spans, 4), torch.float32), x, packed, spec, 1e-3)


def test_what_the_kernel_of_a_few_tokens_refuses():
    assert launch.span(MatrixSpec(4, 100, bits=8, group=96)) == 32
    for spec in (
        MatrixSpec(4, 100, bits=8, group=7),
        MatrixSpec(4, 100, bits=8, group=24),
        MatrixSpec(4, 100, bits=16),
        MatrixSpec(4, 100, bits=3),
        MatrixSpec(4, 96, "8:32", 0, 8),
    ):
        assert not launch.span(spec)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("scales", [(0, True), (16, True), (7, True), (64, False), (6, False), (0, False)], ids=str)
def test_unpacking_integers(bits, scales):
    group, symmetric = scales
    spec = MatrixSpec(21, 109, bits=bits, group=group, symmetric=symmetric)
    packed = random_packed(spec, torch.float32)
    dense = launch.expand_integers(packed, spec, torch.float32, launch.Config(4, 64, 4))
    assert torch.allclose(dense, unpack(packed, spec, torch.float32), rtol=1e-6, atol=0)


WALKED = [*BALANCED, ("12:32", 8, 8), ("16:32", 8, 48), ("16:32", 8, 16), ("12:32", 16, 0), ("8:32", 8, 64)]


@pytest.mark.parametrize("turn", range(len(WALKED)))
def test_walking_from_the_top(turn):
    dtype = (torch.float16, torch.bfloat16)[turn % 2]
    pattern, bits, group = WALKED[turn]
    spec = MatrixSpec(9, 160, pattern, 0, bits, group)
    assert launch.balanced_fits(spec)
    packed, x = random_packed(spec, dtype), inputs(1, 160, dtype)
    check(launch.walk(x, packed, spec, launch.Config(8, 2, 4), torch.float32), x, packed, spec, 1e-5)
    z = launch.pitched(x)
    check(launch.walk(z, packed, spec, launch.Config(4, 4, 4), torch.float32), x, packed, spec, 1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", [("12:32", 8, 64), ("16:32", 16, 0)], ids=str)
def test_balanced_rows_of_every_number_of_tokens(kind, tokens):
    pattern, bits, group = kind
    spec = MatrixSpec(11, 96, pattern, 0, bits, group)
    packed, x = random_packed(spec, torch.float16), inputs(tokens, 96)
    check(launch.balanced(x, packed, spec, launch.Config(4, 8, 4), torch.float32), x, packed, spec, 1e-3)


FACTORS = [
    ((8, 64), ("12:32", 8, 64)),
    ((16, 0), ("16:32", 16, 0)),
    ((4, 32), ("free", 4, 8)),
    ((3, 0), ("8:16", 4, 16)),
]


@pytest.mark.parametrize("kind", FACTORS, ids=str)
@pytest.mark.parametrize("way", [(1, False), (4, False), (70, False), (1, True), (4, True)], ids=str)
def test_both_products_as_a_layer_makes_them(kind, way, monkeypatch):
    """What the first product hands on is what the second reads, also where no kernel can be launched."""
    (bits, group), (pattern, width, size) = kind
    tokens, broken = way
    first = MatrixSpec(64, 96, bits=bits, group=group)
    second = MatrixSpec(21, 64, pattern, 30 if pattern == "free" else 0, width, size)
    stored = random_packed(first, torch.float16), random_packed(second, torch.float16, seed=1)
    x = inputs(tokens, 96)
    tuning.set_tuning(False)
    if broken:

        def fails(*_, **__):
            raise AssertionError("does not compile")

        monkeypatch.setattr(launch, "options", lambda *_: [(fails, launch.Config(1, 1, 1))])
        monkeypatch.setattr(launch, "unpacked", fails)
    hidden = cuda.packed_linear(x, stored[0], first, torch.float16, second)
    y = cuda.packed_linear(hidden, stored[1], second, torch.float16)
    assert y.dtype == torch.float16
    exact = x.double() @ unpack(stored[0], first, torch.float64).T @ unpack(stored[1], second, torch.float64).T
    assert float((y.double() - exact).norm() / exact.norm()) < 4e-3
    assert bool(tuning.failures()) == broken
    tuning.clear()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 16), (4, 32), (4, 0), (2, 64), (2, 0)])
def test_half_steps(bits, group, symmetric):
    """Enough groups that stored zero points, of one bit more than a level, straddle words."""
    spec = MatrixSpec(21, 768, bits=bits, group=group, symmetric=symmetric, half=True)
    packed = random_packed(spec, torch.float16)
    assert torch.equal(launch.unpacked(packed, spec, torch.float32), unpack(packed, spec, torch.float32))
    one, some = inputs(1, 768), inputs(5, 768)
    check(launch.one_token(one, packed, spec, launch.Config(8, 8, 4), torch.float32), one, packed, spec, 1e-5)
    check(launch.dense(one, packed, spec, launch.Config(16, 32, 4), torch.float32), one, packed, spec, 1e-5)
    check(launch.few_tokens(some, packed, spec, launch.Config(16, 4, 4), torch.float32), some, packed, spec)
    check(launch.dense(some, packed, spec, launch.Config(16, 32, 4), torch.float32), some, packed, spec)


def test_half_steps_whose_groups_end_within_an_element():
    spec = MatrixSpec(21, 109, bits=4, group=7, symmetric=False, half=True)
    packed = random_packed(spec, torch.float16)
    for tokens in (1, 3):
        x = inputs(tokens, 109)
        check(launch.dense(x, packed, spec, launch.Config(16, 32, 4), torch.float32), x, packed, spec)


def test_specs_without_a_kernel():
    for spec in (
        MatrixSpec(4, 96, bits=2, trellis=Trellis(16, 2, 32)),
        MatrixSpec(4, 96, "8:32", bits=8, half=True),
        MatrixSpec(4, 96, bits=3, half=True),
    ):
        assert not launch.readable(spec)
    assert launch.readable(MatrixSpec(4, 96, bits=2, half=True))
    assert launch.readable(MatrixSpec(4, 96, bits=2, trellis=Trellis(16, 4, 64)))
