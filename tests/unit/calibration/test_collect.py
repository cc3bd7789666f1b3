import warnings

import pytest
import torch

from cospadi.calibration import StatisticsStore, accumulate, collect, sequences_per_batch
from cospadi.errors import CalibrationError, NumericalError, OutputError, ResourceError
from cospadi.model_view import LayerReplay, discover
from tiny import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer than the .* inputs")


def inputs_of(model, view, ids):
    """What every linear layer gets in the model's own forward, by name, and what it gives without its bias."""
    seen = {}
    hooks = [
        view.module(name).register_forward_hook(lambda m, args, out, n=name: seen.__setitem__(n, args[0]))
        for name in view.module_names
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES, "bloom"])
def test_grams_are_those_of_the_full_forward(tmp_path, architecture):
    model = tiny_model(architecture)
    view = discover(model)
    ids = token_ids(5, 13)
    store = StatisticsStore(tmp_path, {})
    collect(view, ids, store=store, batch=2)  # the last batch is a single sequence
    seen = inputs_of(model, view, ids)
    for group in view.groups:
        found = store.load(group)
        assert found.tokens == 65
        for name in group.modules:  # siblings really have the same input
            expected = accumulate(seen[name])
            # another batch size, other float32 roundings in the layers before: relative to the largest entry
            for ours, theirs in ((found.gram, expected.gram), (found.abs_sum, expected.abs_sum)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5 * float(theirs.abs().max()))


def test_whitened_error_is_the_output_error(tmp_path):
    model = tiny_model("qwen2")
    view = discover(model)
    ids = token_ids(4, 40)
    store = StatisticsStore(tmp_path, {})
    collect(view, ids, store=store, batch=4)
    seen = inputs_of(model, view, ids)
    generator = torch.Generator().manual_seed(5)
    for group in view.groups:
        gram = store.load(group).mean_gram
        for name in group.modules:
            weight = view.weight(name).double()
            miss = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * weight.abs().mean()
            whitened = torch.trace(miss.T @ gram @ miss)
            x = seen[name].double().reshape(-1, group.d_in)
            output = (x @ weight - x @ (weight - miss)).square().sum() / len(x)
            assert abs(float(whitened / output) - 1) < 1e-6


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    view = discover(tiny_model("mistral"))
    ids = token_ids(3, 12)
    whole, broken = StatisticsStore(tmp_path / "a", {}), StatisticsStore(tmp_path / "b", {})
    collect(view, ids, store=whole)

    save = StatisticsStore.save

    def failing(self, layer, statistics, **more):
        if layer == 1:
            raise KeyboardInterrupt
        save(self, layer, statistics, **more)

    monkeypatch.setattr(StatisticsStore, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        collect(view, ids, store=broken)
    assert 0 in broken and 1 not in broken and 2 not in broken
    assert not any(m._forward_pre_hooks for m in view.model.modules())
    monkeypatch.undo()

    first = (tmp_path / "b" / "layer-00000.safetensors").stat().st_mtime_ns
    collect(view, ids, store=StatisticsStore(tmp_path / "b", {}))
    assert (tmp_path / "b" / "layer-00000.safetensors").stat().st_mtime_ns == first
    for name in (f"layer-0000{i}.safetensors" for i in range(3)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_what_is_missing_runs(tmp_path, monkeypatch):
    view = discover(tiny_model())
    ids = token_ids(2, 6)
    store = StatisticsStore(tmp_path, {})
    collect(view, ids, store=store)
    store.discard(1)
    ran = []
    layer = LayerReplay.layer
    monkeypatch.setattr(LayerReplay, "layer", lambda self, i, h, **kw: ran.append(i) or layer(self, i, h, **kw))
    collect(view, ids, store=store)
    assert ran == [0, 1]
    collect(view, ids, store=store)
    assert ran == [0, 1]


def test_batches_do_not_matter(tmp_path):
    view = discover(tiny_model("qwen3"))
    ids = token_ids(5, 10)
    found = []
    for batch in (1, 3, None):
        store = StatisticsStore(tmp_path / str(batch), {})
        collect(view, ids, store=store, batch=batch)
        found.append([store.load(group).gram for group in view.groups])
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


def test_bad_activations_name_the_layer(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    store = StatisticsStore(tmp_path, {})
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.self_attn\.q_proj\+k_proj\+v_proj"):
        collect(discover(model), token_ids(2, 6), store=store)
    assert 0 in store and 1 not in store


def test_out_of_memory_suggests_fewer_samples(tmp_path, monkeypatch):
    view = discover(tiny_model())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cospadi.calibration.statistics.Accumulator.add", full)
    with pytest.raises(ResourceError, match="--samples"):
        collect(view, token_ids(2, 6), store=StatisticsStore(tmp_path, {}))


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path, {})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(OutputError, match="are free"):
        collect(discover(tiny_model()), token_ids(2, 6), store=store)


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)])
def test_wrong_ids(tmp_path, ids):
    with pytest.raises(CalibrationError):
        collect(discover(tiny_model()), ids, store=StatisticsStore(tmp_path, {}))


def test_progress_and_batch_size(tmp_path):
    seen = []
    view = discover(tiny_model())
    collect(view, token_ids(2, 6), store=StatisticsStore(tmp_path, {}), progress=lambda *a: seen.append(a))
    assert seen == [(i + 1, 3, f"model.layers.{i}") for i in range(3)]
    assert sequences_per_batch(1024) == 16 and sequences_per_batch(10**6) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_gives_the_same_grams_and_returns_the_model(tmp_path, architecture):
    model = tiny_model(architecture)
    view = discover(model)
    ids = token_ids(5, 20)
    stores = {device: StatisticsStore(tmp_path / device, {}) for device in ("cpu", "cuda")}
    for device, store in stores.items():
        collect(view, ids, device=device, store=store, batch=2)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for group in view.groups:
        first, second = (store.load(group) for store in stores.values())
        scale = float(first.gram.abs().max())
        torch.testing.assert_close(second.gram, first.gram, rtol=1e-4, atol=1e-5 * scale)
        assert second.tokens == first.tokens == 100


def test_fewer_tokens_than_inputs_is_a_warning(tmp_path):
    view = discover(tiny_model())
    widest = max(group.d_in for group in view.groups)
    for _ in range(2):  # a resumed run says it too
        with pytest.warns(UserWarning, match=f"{widest - 1} calibration tokens are fewer than the {widest} inputs"):
            collect(view, token_ids(1, widest - 1), store=StatisticsStore(tmp_path / "few", {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(view, token_ids(1, widest), store=StatisticsStore(tmp_path / "enough", {}))
