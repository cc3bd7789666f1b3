import pytest
import torch

from cospadi.calibration import Accumulator, accumulate
from cospadi.calibration import statistics as module
from cospadi.errors import NumericalError


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 13), (1, 1), (5, 29), (2, 3, 4, 6)])
def test_sums_match_a_float64_reference(shape, dtype):
    x = random(*shape, dtype=dtype)
    found = accumulate(x)
    rows = x.double().reshape(-1, shape[-1])
    assert found.tokens == len(rows) and found.gram.dtype == found.abs_sum.dtype == torch.float64
    torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.abs_sum, rows.abs().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean_gram * found.tokens, found.gram)
    torch.testing.assert_close(found.mean_abs * found.tokens, found.abs_sum)
    assert torch.equal(found.gram, found.gram.T)


def test_padding_never_enters():
    x = random(4, 9, 5)
    mask = random(4, 9, seed=1) > 0
    x[~mask] = float("nan")
    found = accumulate(x, mask)
    expected = accumulate(x[mask])
    assert found.tokens == int(mask.sum()) == expected.tokens
    assert torch.equal(found.gram, expected.gram)
    assert torch.equal(accumulate(x, mask.long()).gram, expected.gram)


def test_parts_add_up_in_any_order():
    x = random(60, 11)
    parts = [accumulate(part) for part in x.split([7, 33, 20])]
    whole = accumulate(x)
    for order in ((0, 1, 2), (2, 0, 1)):
        total = parts[order[0]] + parts[order[1]] + parts[order[2]]
        assert total.tokens == 60
        torch.testing.assert_close(total.gram, whole.gram, rtol=1e-6, atol=3e-5)
        torch.testing.assert_close(total.abs_sum, whole.abs_sum)


def test_long_sums_keep_their_precision():
    # one float32 sum over all of these would lose the small channel beside the large one
    x = random(20 * module.CHUNK_TOKENS, 2).abs() + 1
    x[:, 1] *= 1e-3
    rows = x.double()
    torch.testing.assert_close(accumulate(x).gram, rows.T @ rows, rtol=3e-7, atol=0)


def test_tf32_is_off_whatever_the_process_says(monkeypatch):
    seen = []
    original = torch.Tensor.abs
    monkeypatch.setattr(
        torch.Tensor, "abs", lambda self: seen.append(torch.get_float32_matmul_precision()) or original(self)
    )
    torch.set_float32_matmul_precision("medium")
    try:
        accumulate(random(4, 3))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and set(seen) == {"highest"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_bad_activations_name_layer_and_channel(bad):
    x = random(6, 8)
    x[4, 5] = bad
    accumulator = Accumulator("model.layers.7.mlp", 8)
    accumulator.add(x)
    accumulator.add(random(6, 8))
    with pytest.raises(NumericalError, match=r"model\.layers\.7\.mlp: .*first: "):
        accumulator.finish()


def test_large_grams_are_symmetric_across_blocks():
    x = random(40, 1500)
    gram = accumulate(x).gram
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, x.double().T @ x.double(), rtol=1e-5, atol=1e-5)
