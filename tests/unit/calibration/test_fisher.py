import pytest
import torch
from torch.nn import functional

from cospadi.calibration import fisher
from cospadi.errors import NumericalError
from cospadi.model_view import discover
from tiny import tiny_model, token_ids


def reference(model, view, ids):
    """Squares of the gradients of each sequence's loss, one backward pass each, averaged."""
    model = model.double()
    total = dict.fromkeys(view.module_names, 0.0)
    for row in ids:
        model.zero_grad()
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits, row[1:]).backward()
        for name in total:
            total[name] = total[name] + view.module(name).weight.grad.T.square()
    return {name: value / len(ids) for name, value in total.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_mean_squared_gradients_of_sequences(architecture):
    ids = token_ids(3, 11)
    model = tiny_model(architecture)
    view = discover(model)
    found = fisher(view, ids)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    expected = reference(model, view, ids)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.shape == view.weight(name).shape
        scale = float(expected[name].max())
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-5 * scale)


def test_a_short_model_is_computed_in_float32_and_unchanged():
    ids = token_ids(2, 9)
    model = tiny_model(dtype=torch.bfloat16).train()
    model.lm_head.weight.requires_grad_(False)
    view = discover(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen = []
    found = fisher(view, ids, progress=lambda *a: seen.append(a))
    assert seen == [(1, 2, "gradients"), (2, 2, "gradients")]
    assert model.training and model.dtype == torch.bfloat16
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    expected = fisher(discover(model.float()), ids)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_bad_gradients_name_the_layer():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\."):
        fisher(discover(model), token_ids(1, 5))
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_and_returns_the_model():
    ids = token_ids(3, 15)
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    view = discover(model)
    first, second = fisher(view, ids), fisher(view, ids, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cpu"} and model.dtype == torch.bfloat16
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=1e-4 * float(value.max()))
