import pytest
import torch
from torch import nn

from cospadi.errors import ModelError
from cospadi.model_view import LayerReplay, discover
from tiny import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model, token_ids


def run(view, ids, device="cpu"):
    with LayerReplay(view, device) as replay:
        hidden = replay.embed(ids)
        for index in range(len(view.layers)):
            hidden = replay.layer(index, hidden)
        return replay.logits(ids, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES, "bloom"])
def test_replay_is_bit_equal_to_the_full_forward(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    view = discover(model)
    for shape in ((2, 21), (1, 5), (3, 21)):  # longer and shorter than the sliding window of 8
        ids = token_ids(*shape)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(run(view, ids), expected)


def test_masks_of_layer_zero_would_be_wrong_for_gemma():
    # guards the test above: if all layers of the tiny model got equal arguments, it would prove nothing
    model = tiny_model("gemma3_text")
    replay = LayerReplay(discover(model))
    ids = token_ids(2, 21)
    hidden = replay.embed(ids)
    replay._recorded[(2, 21)] = [replay._recorded[(2, 21)][0]] * 3
    for index in range(3):
        hidden = replay.layer(index, hidden)
    assert not torch.equal(replay.logits(ids, hidden), model(input_ids=ids, use_cache=False).logits)


def test_arguments_are_recorded_once_per_shape(monkeypatch):
    model = tiny_model()
    replay = LayerReplay(discover(model))
    walks = []
    walk = replay._walk
    monkeypatch.setattr(replay, "_walk", lambda ids, **kw: walks.append(kw) or walk(ids, **kw))
    first = token_ids(2, 7)
    replay.embed(first)
    full = len(walks)
    hidden = replay.embed(first + 0)
    assert len(walks) == full + 1 and walks[-1] == {"stop_at": 0}
    assert torch.equal(hidden, model.get_input_embeddings()(first))


def test_replaced_modules_run():
    model = tiny_model()
    view = discover(model)
    ids = token_ids(2, 6)
    before = run(view, ids)
    model.model.layers[1].mlp.down_proj = nn.Linear(44, 24, bias=True)
    after = run(view, ids)
    with torch.no_grad():
        assert torch.equal(after, model(input_ids=ids, use_cache=False).logits)
    assert not torch.equal(before, after)


def test_gradients_only_when_asked():
    view = discover(tiny_model())
    replay = LayerReplay(view)
    hidden = replay.embed(token_ids(1, 6))
    assert not replay.layer(0, hidden).requires_grad
    out = replay.layer(0, hidden, grad=True)
    out.square().sum().backward()
    assert view.module(view.module_names[0]).weight.grad.abs().sum() > 0


def test_forwards_are_restored_also_those_set_by_others():
    model = tiny_model()
    view = discover(model)
    layer = view.layers[1]
    own = layer.forward
    layer.forward = lambda *a, **k: own(*a, **k)
    mine = layer.forward
    run(view, token_ids(1, 6))
    assert layer.forward is mine
    assert all("forward" not in other.__dict__ for other in (view.layers[0], view.layers[2]))


def test_layers_that_see_the_tokens_are_refused():
    model = tiny_model()
    view = discover(model)
    forward = model.forward
    model.forward = lambda input_ids, **kw: forward(input_ids=input_ids, position_ids=input_ids % 3, **kw)
    with pytest.raises(ModelError, match="more than hidden states and positions"):
        LayerReplay(view).embed(token_ids(1, 6))


def test_an_unknown_shape_is_a_mistake():
    replay = LayerReplay(discover(tiny_model()))
    with pytest.raises(KeyError):
        replay.layer(0, torch.zeros(1, 3, 24))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_layer_at_a_time_on_the_gpu(architecture):
    model = tiny_model(architecture)
    view = discover(model)
    ids = token_ids(2, 21)
    expected = run(view, ids)
    with LayerReplay(view, "cuda") as replay:
        hidden = replay.embed(ids)
        for index in range(3):
            hidden = replay.layer(index, hidden)
            on_device = [{p.device.type for p in layer.parameters()} for layer in view.layers]
            assert on_device == [{"cuda"} if i == index else {"cpu"} for i in range(3)]
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    torch.testing.assert_close(replay.logits(ids, hidden), expected, rtol=1e-3, atol=1e-3)
