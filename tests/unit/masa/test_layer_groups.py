"""The logit lens against the model's own modules, and where groups end."""

import pytest
import torch

from cospadi.calibration import logit_lens as lens
from cospadi.calibration.logit_lens import logit_lens
from cospadi.errors import CalibrationError, NumericalError, RecipeError
from cospadi.masa.retrofit.layer_groups import divergences, group_layers
from cospadi.model_view import discover
from tiny import tiny_model, token_ids


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "opt"])
def test_logit_lens_is_the_models_own_norm_and_head(architecture):
    model = tiny_model(architecture, num_hidden_layers=4)
    view = discover(model)
    ids = token_ids(3, 12)
    seen = []

    def note(_module, _args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(note) for layer in view.layers]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    found = logit_lens(view, ids)
    assert found.shape == (4, 257) and found.dtype == torch.float64
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    names = {"llama": "norm", "qwen3": "norm", "gpt_neox": "final_layer_norm", "opt": "decoder.final_layer_norm"}
    norm, head = model.base_model.get_submodule(names[architecture]), model.get_output_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(head(norm(seen[-1])), whole)
        for layer in range(4):
            expected = head(norm(seen[layer].mean((0, 1)))).double().log_softmax(-1)
            torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-4)


def test_only_the_first_sequences_are_read(monkeypatch):
    view = discover(tiny_model())
    ids = token_ids(6, 10)
    few = logit_lens(view, ids[:2])
    assert not torch.allclose(few, logit_lens(view, ids))
    monkeypatch.setattr(lens, "LENS_TOKENS", 25)
    assert torch.equal(few, logit_lens(view, ids))


def test_divergences():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(5, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    found = divergences(log_p)
    for layer in range(4):
        expected = torch.nn.functional.kl_div(log_p[layer + 1], log_p[layer], reduction="sum", log_target=True)
        assert float(found[layer]) == pytest.approx(float(expected), rel=1e-12)
    assert not divergences(log_p[:1].repeat(3, 1)).any()


def test_groups_by_number():
    distances = torch.tensor([0.1, 0.9, 0.2, 0.5])
    assert group_layers(distances, groups=1) == [range(5)]
    assert group_layers(distances, groups=2) == [range(2), range(2, 5)]
    assert group_layers(distances, groups=3) == [range(2), range(2, 4), range(4, 5)]
    assert group_layers(distances, groups=5) == [range(i, i + 1) for i in range(5)]
    assert group_layers(torch.ones(3), groups=2) == [range(1), range(1, 4)]
    assert group_layers(torch.ones(0), groups=1) == [range(1)]


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.4, 1.0])
def test_groups_by_threshold(threshold):
    distances = torch.tensor([0.1, 0.9, 0.2, 0.5, 0.05])
    groups = group_layers(distances, threshold=threshold)
    assert [layer for group in groups for layer in group] == list(range(6))
    cuts = {group[-1] for group in groups[:-1]}
    assert cuts == {i for i in range(5) if distances[i] > threshold}


def test_bad_groups():
    with pytest.raises(RecipeError, match="give one of the two"):
        group_layers(torch.ones(3))
    with pytest.raises(RecipeError, match="give one of the two"):
        group_layers(torch.ones(3), groups=2, threshold=0.1)
    for groups in (0, 5):
        with pytest.raises(RecipeError, match=f"{groups} groups of 4 layers"):
            group_layers(torch.ones(3), groups=groups)


def test_bad_text_and_damaged_models():
    view = discover(tiny_model())
    with pytest.raises(CalibrationError, match="token ids"):
        logit_lens(view, torch.zeros(0, 8, dtype=torch.long))
    with torch.no_grad():
        view.module("model.layers.1.mlp.down_proj").weight[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        logit_lens(view, token_ids(2, 8))
