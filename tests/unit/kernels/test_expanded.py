"""Dense forms that a processor keeps: decoded once, again after a change, gone with the layer."""

import gc

import pytest
import torch

from cospadi.format import MatrixSpec, Trellis, unpack
from cospadi.kernels import expanded as module
from cospadi.kernels import factored_linear, reference
from cospadi.kernels.synthetic import random_packed

SPEC = MatrixSpec(70, 45, bits=2, trellis=Trellis(10, 4, 16))


@pytest.fixture
def decoded(monkeypatch):
    """How often something was decoded."""
    module.forget()
    calls = []

    def counting(packed, spec, kind, of=module.dense_rows):
        calls.append(kind)
        return of(packed, spec, kind)

    monkeypatch.setattr(module, "dense_rows", counting)
    yield calls
    module.forget()


def run(packed, x):
    return factored_linear(x, None, None, packed, SPEC)


def test_a_matrix_is_decoded_once(decoded):
    packed, x = random_packed(SPEC, torch.float32), torch.randn(3, 45)
    first = run(packed, x)
    assert torch.equal(run(packed, x), first) and len(decoded) == 1
    torch.testing.assert_close(first.double(), reference(x, None, None, packed, SPEC), rtol=1e-5, atol=1e-6)


def test_it_is_decoded_again_when_values_or_scales_change(decoded):
    packed, x = random_packed(SPEC, torch.float32), torch.randn(2, 45)
    before = run(packed, x)
    with torch.no_grad():
        packed["scales"].mul_(2)
    torch.testing.assert_close(run(packed, x), 2 * before)
    packed["values"].copy_(random_packed(SPEC, torch.float32, seed=5)["values"])
    other = run(packed, x)
    torch.testing.assert_close(other, x @ unpack(packed, SPEC).T, rtol=1e-5, atol=1e-6)
    packed["scales"] = packed["scales"] / 2
    torch.testing.assert_close(run(packed, x), other / 2)
    assert len(decoded) == 4


def test_another_matrix_or_dtype_is_another_form(decoded):
    x = torch.randn(2, 45)
    run(random_packed(SPEC, torch.float32), x)
    packed = random_packed(SPEC, torch.float32, seed=1)
    torch.testing.assert_close(run(packed, x), x @ unpack(packed, SPEC).T, rtol=1e-5, atol=1e-6)
    module.expanded(packed, SPEC, torch.bfloat16)
    assert decoded == [torch.float32, torch.float32, torch.bfloat16]


def test_it_goes_with_its_values(decoded):
    packed = random_packed(SPEC, torch.float32)
    run(packed, torch.randn(1, 45))
    assert len(module._kept) == 1
    del packed
    gc.collect()
    assert not module._kept


def test_inference_tensors_are_not_kept(decoded):
    with torch.inference_mode():
        packed = random_packed(SPEC, torch.float32)
        x = torch.randn(1, 45)
        before = run(packed, x)
        packed["scales"].mul_(2)
        torch.testing.assert_close(run(packed, x), 2 * before)
    assert not module._kept
