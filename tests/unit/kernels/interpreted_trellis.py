"""The Triton kernels of trellis codes on CPU, in Triton's interpreter, against the format's own decoder.

Run by test_interpreted.py in a process of its own, with TRITON_INTERPRET=1 from the start.
"""

import os

import pytest
import torch

from cospadi.format import MatrixSpec, Stored, Trellis, pack, unpack
from cospadi.kernels.triton.launch_common import Config
from cospadi.kernels.triton.launch_trellis import expand_trellis, trellis, trellis_fits

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"

SHAPES = [
    (2, Trellis(16, 4, 64), 100, 70),
    (3, Trellis(12, 8, 32), 64, 64),
    (4, Trellis(16, 4, 16), 17, 30),
    (1, Trellis(8, 16, 16), 40, 33),
    (2, Trellis(16, 8, 32), 33, 257),
]


def stored(bits, code, rows, columns, dtype):
    spec = MatrixSpec(rows, columns, bits=bits, trellis=code)
    generator = torch.Generator().manual_seed(rows)
    symbols = torch.randint(0, 1 << bits, (*code.tiles(rows, columns), code.values), generator=generator)
    scales = torch.rand(rows, 1, generator=generator) / 147.8
    return spec, pack(Stored(symbols.to(torch.uint8), scales.to(dtype)), spec, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_of_few_tokens(shape, tokens):
    spec, packed = stored(*shape, torch.float16)
    assert trellis_fits(spec)
    x = torch.randn(tokens, spec.columns, generator=torch.Generator().manual_seed(1)).half()
    exact = x.double() @ unpack(packed, spec, torch.float64).T
    for width in (2, 8):
        y = trellis(x, packed, spec, Config(1, width, 4), torch.float16)
        assert y.shape == exact.shape and y.dtype == torch.float16
        assert float((y.double() - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_dense_form_is_that_of_the_format(shape, dtype):
    spec, packed = stored(*shape, torch.float16)
    assert torch.equal(expand_trellis(packed, spec, dtype), unpack(packed, spec, dtype))


def test_codes_whose_windows_do_not_fit_are_left_alone():
    assert not trellis_fits(MatrixSpec(64, 64, bits=2, trellis=Trellis(16, 2, 32)))
    assert not trellis_fits(MatrixSpec(64, 64, bits=2))
