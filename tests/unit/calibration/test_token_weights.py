"""Token weights and loss-weighted Grams, against gradients that autograd computes through the whole model at once."""

import random
import warnings

import pytest
import torch

from cospadi.calibration import StatisticsStore, Weights, accumulate, averaged, blended, collect, token_weights
from cospadi.calibration import token_weights as weights_module
from cospadi.calibration.loss_gram import LossGram
from cospadi.calibration.statistics import Accumulator
from cospadi.calibration.token_weights import sampled, usable
from cospadi.errors import OutputError
from cospadi.model_view import discover
from cospadi.runtime.fingerprints import derived_seed
from tiny import ARCHITECTURES, tiny_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are")
module = __import__("sys").modules[weights_module.__module__]


def reference(model, view, ids, seed):
    """Squared gradients of the loss with respect to every linear layer's outputs, in float64, by one backward pass."""
    labels = []
    with torch.no_grad():
        for at, row in enumerate(ids):
            predictions = model(input_ids=row[None], use_cache=False).logits[0].float().softmax(-1)
            labels.append(sampled(predictions, derived_seed(seed, f"labels {at}")))
    model = model.double()
    outputs = {}
    hooks = [
        view.module(name).register_forward_hook(
            lambda m, args, out, n=name: (out.retain_grad(), outputs.update({n: out}))[1]
        )
        for name in view.module_names
    ]
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = {name: out.grad.square().sum(-1) for name, out in outputs.items()}
    model.zero_grad()
    model.float()
    return found


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3_text", "phi3", "gpt_neox", "opt"])
def test_weights_are_those_of_one_backward_pass_through_the_whole_model(tmp_path, architecture):
    seed = random.SystemRandom().randrange(10**6)
    model, ids = tiny_model(architecture, seed=seed), token_ids(5, 13, seed=seed)
    view = discover(model)
    found = token_weights(view, ids, tmp_path, seed=seed).of(view.module_names)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert found.keys() == set(view.module_names)
    expected = reference(model, view, ids, seed)
    unit = None
    for name, item in found.items():
        raw = expected[name].flatten()
        clipped = raw.clamp_max(raw.sort().values[-6])  # one token a sequence is clipped
        torch.testing.assert_close(item.values.double(), clipped / clipped.mean(), rtol=2e-3, atol=1e-3)
        unit = unit or item.energy / float(clipped.mean())
        assert item.energy == pytest.approx(unit * float(clipped.mean()), rel=1e-3)


def test_text_in_parts_gives_the_same_weights_and_is_resumed(tmp_path, monkeypatch):
    model, ids = tiny_model("qwen3"), token_ids(7, 12)
    view = discover(model)
    whole = token_weights(view, ids, tmp_path / "whole", seed=3).of(view.module_names)
    monkeypatch.setattr(module, "PART_TOKENS", 24)
    monkeypatch.setattr(module, "BACKWARD_TOKENS", 12)
    monkeypatch.setattr(module, "LOGITS", 12 * 257)
    real, made = module.squared_gradients, []

    def stops(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return real(*args)

    monkeypatch.setattr(module, "squared_gradients", stops)
    with pytest.raises(KeyboardInterrupt):
        token_weights(view, ids, tmp_path / "parts", seed=3)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 2
    made = []
    monkeypatch.setattr(module, "squared_gradients", lambda *args: (made.append(args), real(*args))[1])
    seen = []
    again = token_weights(view, ids, tmp_path / "parts", seed=3, progress=lambda *a: seen.append(a))
    assert len(made) == 2 and seen[-1] == (4, 4, "gradients")
    for name, item in again.of(view.module_names).items():
        torch.testing.assert_close(item.values, whole[name].values, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(module, "squared_gradients", real)
    fresh = token_weights(view, ids, tmp_path / "fresh", seed=3).of(view.module_names)
    assert all(torch.equal(fresh[n].values, item.values) for n, item in again.of(view.module_names).items())


def test_labels_follow_the_seed_and_the_predictions():
    predictions = torch.tensor([[0.7, 0.2, 0.1]]).expand(20_000, 3)
    drawn = sampled(predictions, 5)
    assert torch.equal(drawn, sampled(predictions, 5)) and not torch.equal(drawn, sampled(predictions, 6))
    shares = drawn.bincount(minlength=3) / len(drawn)
    torch.testing.assert_close(shares, predictions[0], atol=0.02, rtol=0)


def test_the_seed_decides(tmp_path):
    view, ids = discover(tiny_model()), token_ids(3, 10)
    first, second, other = (
        token_weights(view, ids, tmp_path / str(at), seed=seed).of(view.module_names)
        for at, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(first[name].values, second[name].values) for name in first)
    assert not any(torch.equal(first[name].values, other[name].values) for name in first)


def test_few_tokens_do_not_make_up_the_gram():
    raw = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    raw[:5] = 1e6
    found = usable(raw[None])
    assert float(found.values.max()) < 3 and float(found.values.mean()) == pytest.approx(1, rel=1e-5)
    assert found.effective == pytest.approx(5000 * 0.75, rel=0.05)  # (mean)² / mean square of a uniform draw


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_that_vanish_or_overflow_are_of_no_use(value):
    raw = torch.zeros(4, 25)
    raw[3, 3] = value
    assert usable(raw) is None


def test_one_token_a_sequence_that_all_others_attend_to_does_not_make_up_the_gram():
    raw = torch.rand(12, 50, generator=torch.Generator().manual_seed(1))
    raw[:, 0] = 1e4
    assert float(usable(raw).values.max()) < 3


def test_a_layer_without_gradients_keeps_its_plain_gram_and_is_named(tmp_path):
    model, ids = tiny_model(), token_ids(4, 12)
    with torch.no_grad():  # nothing that the first layer's MLP puts out is heard
        model.model.layers[0].mlp.down_proj.weight.zero_()
    view = discover(model)
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.(gate|up)_proj and 1 more: the Grams there are plain"):
        weights = token_weights(view, ids, tmp_path / "w", seed=0)
    store = StatisticsStore(tmp_path / "s", {})
    collect(view, ids, store=store, weights=weights)
    group = next(g for g in view.groups if g.modules[0] == "model.layers.0.mlp.gate_proj")
    assert not store.load(group, group.modules).loss
    group = view.groups[0]
    assert store.load(group, group.modules).loss.keys() == set(group.modules)


def test_float16_gradients_that_overflow(tmp_path):
    model, ids = tiny_model(dtype=torch.float16), token_ids(3, 12)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
        model.model.norm.weight.mul_(30)
    view = discover(model)
    with pytest.warns(UserWarning, match="and 20 more: the Grams there are plain"):
        assert token_weights(view, ids, tmp_path, seed=0).of(view.module_names) == {}


def test_without_memory_all_grams_are_plain_and_stay_so(tmp_path, monkeypatch):
    view, ids = discover(tiny_model()), token_ids(3, 12)
    with monkeypatch.context() as patch:

        def exhausted(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(module, "squared_gradients", exhausted)
        with pytest.warns(UserWarning, match=r"no gradients of the loss .*memory.*: all Grams are plain"):
            assert token_weights(view, ids, tmp_path, seed=0).of(view.module_names) == {}
    with pytest.warns(UserWarning, match="all Grams are plain"):  # half of a run must not differ from the other
        assert token_weights(view, ids, tmp_path, seed=0).of(view.module_names) == {}


@pytest.mark.filterwarnings("default")
def test_a_short_text_is_told_how_much_is_needed(tmp_path):
    view = discover(tiny_model())
    with pytest.warns(UserWarning, match=r"36 calibration tokens are few .* needs about (\d+); give --samples (\d+)"):
        token_weights(view, token_ids(3, 12), tmp_path / "short", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_weights(view, token_ids(40, 60), tmp_path / "long", seed=0)


def test_a_damaged_part_is_named(tmp_path):
    view = discover(tiny_model())
    found = token_weights(view, token_ids(2, 12), tmp_path, seed=0)
    (tmp_path / "part-00000.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"part-00000.*damaged"):
        found.of(view.module_names)


def test_weighted_sums_against_the_definition():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1300, 7, generator=generator)
    values = torch.rand(1300, generator=generator)
    sums = Accumulator("a", 7, weights={"a": Weights(values, 2.5)})
    for part in torch.split(x.reshape(13, 100, 7), 4):
        sums.add(part)
    found = sums.finish()
    expected = x.double().T @ (values.double()[:, None] * x.double())
    torch.testing.assert_close(found.loss["a"].gram, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.loss["a"].gram, found.loss["a"].gram.T) and found.loss["a"].energy == 2.5
    plain = accumulate(x.reshape(13, 100, 7)[:4])
    assert torch.equal(plain.gram, plain.gram.T)


def test_collected_grams_are_those_of_every_module(tmp_path):
    view, ids = discover(tiny_model("qwen2")), token_ids(6, 11)
    weights = token_weights(view, ids, tmp_path / "w", seed=0)
    plain, both = StatisticsStore(tmp_path / "p", {}), StatisticsStore(tmp_path / "b", {})
    collect(view, ids, store=plain, batch=2)
    collect(view, ids, store=both, batch=2)
    collect(view, ids, store=both, batch=2, weights=weights)  # a comparison may ask for them later
    seen = {}
    hooks = [
        view.module(name).register_forward_hook(lambda m, args, out, n=name: seen.update({n: args[0]}))
        for name in view.module_names
    ]
    with torch.no_grad():
        view.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for group in view.groups:
        found = both.load(group, group.modules)
        assert torch.equal(found.gram, plain.load(group).gram)
        for name, item in weights.of(group.modules).items():
            x = seen[name].flatten(0, 1).double()
            expected = x.T @ (item.values.double()[:, None] * x)
            scale = float(expected.abs().max())
            torch.testing.assert_close(found.loss[name].gram, expected, rtol=1e-4, atol=3e-5 * scale)
            assert found.loss[name].energy == item.energy


def test_siblings_are_averaged_by_the_squared_gradients_of_all_their_outputs():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    raw = [torch.rand(400, generator=generator, dtype=torch.float64) * size for size in (1, 7, 30)]
    grams = [LossGram(x.T @ (r[:, None] / r.mean() * x), float(r.mean())) for r in raw]
    together = sum(raw)
    expected = x.T @ (together[:, None] / together.mean() * x)
    torch.testing.assert_close(averaged(grams), expected)
    assert averaged([]) is None and averaged(grams[:1]) is grams[0].gram


def test_the_blend_keeps_the_trace():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    plain, loss = x.T @ x / 50, 1e5 * y.T @ y
    for blend in (0.0, 0.2, 0.9):
        found = blended(plain, loss, blend)
        assert float(found.trace()) == pytest.approx(float(plain.trace()))
        share = loss * (plain.trace() / loss.trace())
        torch.testing.assert_close(found, (1 - blend) * share + blend * plain)
    assert blended(plain, loss, 1.0) is plain and blended(plain, None, 0.2) is plain
    assert blended(plain, torch.zeros_like(loss), 0.2) is plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_streams_the_layers_of_a_model_on_the_host(tmp_path):
    model, ids = tiny_model("gemma3_text"), token_ids(5, 24)
    view = discover(model)
    first = token_weights(view, ids, tmp_path / "1", seed=7, device="cuda").of(view.module_names)
    second = token_weights(view, ids, tmp_path / "2", seed=7, device="cuda").of(view.module_names)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    expected = reference(model.to("cuda"), view, ids.to("cuda"), 7)
    for name, item in first.items():
        assert torch.equal(item.values, second[name].values)
        raw = expected[name].flatten().cpu()
        raw = raw.clamp_max(raw.sort().values[-6])
        torch.testing.assert_close(item.values.double(), raw / raw.mean(), rtol=2e-2, atol=1e-2)
