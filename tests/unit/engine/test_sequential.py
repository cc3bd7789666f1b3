"""Two streams, the anchored target, and the layer-by-layer run: numbers against direct computation, and resumption."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from cospadi.engine.compress import compress
from cospadi.engine.plan.plan import make_plan
from cospadi.engine.tune.sequential import require_layers
from cospadi.engine.tune.streams import Moments, Streams, anchored_error, anchored_target
from cospadi.errors import RecipeError
from cospadi.format import GroupSpec, MatrixSpec
from cospadi.model_view import discover
from cospadi.recipe import Recipe
from tiny import save_tiny, tiny_model, tiny_text, token_ids


def streams_of_inputs(*, tokens=211, d=13, noise=0.4, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    original = draw(tokens, d) @ draw(d, d)
    compressed = original + noise * draw(tokens, d)
    if rank is not None:
        compressed = compressed @ torch.linalg.qr(draw(d, rank))[0] @ draw(rank, d)
    moments = Moments(compressed.T @ compressed / tokens, compressed.T @ original / tokens, compressed.abs().mean(0))
    return original, compressed, moments, draw(d, 7)


def test_the_anchored_target_is_the_least_squares_solution():
    original, compressed, moments, weight = streams_of_inputs()
    expected = torch.linalg.lstsq(compressed, original @ weight).solution
    assert torch.allclose(anchored_target(weight, moments, ridge=1e-12, blend=1.0), expected, atol=1e-8)
    assert not torch.allclose(expected, weight, atol=1e-2)
    half = anchored_target(weight, moments, ridge=1e-12, blend=0.5)
    assert torch.allclose(half, (weight + expected) / 2, atol=1e-8)


def test_without_a_difference_between_the_streams_the_target_is_the_weight():
    _, _, moments, weight = streams_of_inputs(noise=0.0)
    assert torch.allclose(anchored_target(weight, moments, ridge=1e-2, blend=1.0), weight, atol=1e-10)


def test_directions_that_the_text_never_visits_keep_their_weight():
    _, compressed, moments, weight = streams_of_inputs(rank=6)
    target = anchored_target(weight, moments, ridge=1e-3, blend=1.0)
    unvisited = torch.linalg.svd(compressed, full_matrices=True).Vh[6:]
    assert torch.allclose(unvisited @ target, unvisited @ weight, atol=1e-8)
    assert not torch.allclose(target, weight, atol=1e-2)


def test_the_anchored_error_is_that_of_the_outputs():
    original, compressed, moments, weight = streams_of_inputs()
    approximation = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)).double()
    energy = float((original @ weight).square().sum() / len(original))
    expected = (original @ weight - compressed @ approximation).square().sum() / len(original) / energy
    assert anchored_error(weight, approximation, moments, energy) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "opt"])
def test_moments_are_those_of_the_inputs_of_both_streams(architecture):
    model = tiny_model(architecture)
    view, ids = discover(model), token_ids(5, 11)
    streams = Streams(view, ids, torch.device("cpu"))
    streams.batch = 2  # batches of 2, 2 and 1
    for size in (2, 1):
        streams.replay.prepare(ids[:size])
    first, last = view.of_layer(0)[0], view.of_layer(0)[-1]
    generator = torch.Generator().manual_seed(3)
    noisy = {name: view.weight(name).T + 0.3 * torch.randn(view.weight(name).T.shape, generator=generator)
             for name in first.modules}  # fmt: skip
    streams.compressed = streams.original + 0.1 * torch.randn(streams.original.shape, generator=generator)
    found = streams.moments(0, last, {f"{streams.relative(0, name)}.weight": w for name, w in noisy.items()})

    def inputs(tensors, hidden):
        seen = []
        handle = view.module(last.modules[0]).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        full = {f"{name}.weight": weight for name, weight in tensors.items()}
        first_layer = view.layers[0].register_forward_pre_hook(
            lambda _m, args, kwargs: (
                ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            functional_call(model, full, (), {"input_ids": ids, "use_cache": False})
        handle.remove()
        first_layer.remove()
        return seen[0].reshape(-1, last.d_in).double()

    before, after = inputs({}, streams.original), inputs(noisy, streams.compressed)
    assert torch.allclose(found.gram, after.T @ after / len(after), rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.cross, after.T @ before / len(after), rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.mean_abs, after.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found.gram, found.cross, rtol=1e-2)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_one_pass_collects_the_statistics_of_every_input_of_the_compressed_stream():
    view, ids = discover(tiny_model("llama")), token_ids(5, 11)
    streams = Streams(view, ids, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    streams.compressed = streams.original + 0.1 * torch.randn(streams.original.shape, generator=generator)
    groups = view.of_layer(1)
    found = streams.statistics(1, groups)
    assert list(found) == list(groups) and len(groups) > 2
    for group in groups:
        alone = streams.moments(1, group, {})
        assert torch.allclose(found[group].mean_gram, alone.gram, rtol=1e-6)
        assert torch.allclose(found[group].mean_abs, alone.mean_abs, rtol=1e-6)
        assert found[group].tokens == ids.numel()
    assert all(not module._forward_pre_hooks for module in view.model.modules())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "m", "llama", dtype=torch.float32)


def run(model_path, out, **changes):
    recipe = Recipe().merged({"calibration": {"samples": 40, "seq_len": 24}})
    return compress(
        model_path, out, recipe=recipe, calibration=[tiny_text(2000)], device="cpu", **({"method": "svd_llm"} | changes)
    )


def test_anchored_layers_come_nearer_to_the_original_output(model_path, tmp_path):
    once = {"steps": 1}  # refinement makes a run report the errors of its layers' outputs before it
    plain = run(model_path, tmp_path / "plain", keep=0.5, refine=once).report
    anchored = run(model_path, tmp_path / "anchored", keep=0.5, anchor=True, refine=once).report
    worse, better = (report["layers"][-1]["block_error_before"] for report in (plain, anchored))
    assert better < 0.95 * worse
    assert all(group["anchored_error"] > 0 for group in anchored["groups"])
    assert "anchored_error" not in plain["groups"][0]


def stored(out):
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor for name, tensor in tensors.items() if ".layers." in name and "norm" not in name}


@pytest.mark.parametrize("method", ["svd_llm", "gptq", "sparsegpt"])
def test_sequential_statistics_follow_the_compressed_layers(model_path, tmp_path, method):
    plain = run(model_path, tmp_path / "plain", keep=0.4, method=method, sequential=False)
    found = run(model_path, tmp_path / "sequential", keep=0.4, method=method, sequential=True)
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "sequential")
    assert before.keys() == after.keys()
    changed = {name.split(".layers.")[1][0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1", "2"}  # nothing is compressed before the first layer
    assert [group["bytes"] for group in plain.report["groups"]] == [group["bytes"] for group in found.report["groups"]]
    assert "anchored_error" not in found.report["groups"][0]


def test_a_method_may_publish_sequential_statistics(model_path, tmp_path):
    assert "layers" in run(model_path, tmp_path / "own", keep=0.4, method="gptq").report
    assert "layers" not in run(model_path, tmp_path / "plain", keep=0.4, method="gptq", sequential=False).report
    assert "layers" not in run(model_path, tmp_path / "other", keep=0.4, method="rtn").report


def test_svd_llm_updates_its_codes_under_the_grams_of_the_compressed_layers(model_path, tmp_path):
    run(model_path, tmp_path / "plain", keep=0.4)
    found = run(model_path, tmp_path / "updated", keep=0.4, options={"sequential_update": True})
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "updated")
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("dictionary" in name for name in differ)  # from the original model's Grams, as without the update
    assert {name.split(".layers.")[1][0] for name in differ} == {"0", "1", "2"}
    run(model_path, tmp_path / "dense", keep=0.4, options={"sequential_update": True}, sequential=False)
    dense = stored(tmp_path / "dense")
    moved = {name.split(".layers.")[1][0] for name in after if not torch.equal(dense[name], after[name])}
    assert moved == {"1", "2"} and "layers" in found.report  # nothing is compressed before the first layer


def test_a_methods_own_order_gives_way_to_groups_across_layers(model_path, tmp_path):
    across = {"keep": 0.4, "method": "gptq", "grouping": "cross_layer"}
    assert "layers" not in run(model_path, tmp_path / "own", **across).report
    with pytest.raises(RecipeError, match="leave them out"):
        run(model_path, tmp_path / "asked", sequential=True, **across)


def test_an_anchor_without_compressed_inputs_is_refused():
    with pytest.raises(RecipeError, match="sequential"):
        Recipe(anchor=True, sequential=False)


def test_the_share_of_the_anchor_counts(model_path, tmp_path):
    errors = [
        run(model_path, tmp_path / str(share), keep=0.4, anchor=True, anchor_share=share).report["groups"][-1]["error"]
        for share in (0.05, 1.0)
    ]
    assert errors[0] < errors[1]  # against the original weights the full correction is the larger change


def test_without_feedback_nothing_of_it_is_reported(model_path, tmp_path):
    report = run(model_path, tmp_path / "out", keep=0.5).report
    assert "layers" not in report and "refine" not in report["seconds"]


def test_groups_across_layers_are_refused():
    view = discover(tiny_model("llama"))
    plan = make_plan(view, Recipe(keep=0.5, method="svd_llm"))
    require_layers(plan)
    first, other = (next(g for g in plan.groups if g.layer == layer) for layer in (0, 1))
    modules = first.spec.modules + other.spec.modules
    rows = first.spec.d_out + other.spec.d_out
    spec = GroupSpec(modules, first.spec.d_in, rows, MatrixSpec(sum(rows), 5), MatrixSpec(5, first.spec.d_in), "shared")
    with pytest.raises(RecipeError, match="'shared' spans several"):
        require_layers(replace(plan, groups=(replace(first, spec=spec, sources=first.sources + other.sources),)))


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "feedback", [{"sequential": True}, {"anchor": True}, {"refine": {"steps": 3}}, {"anchor": True, "refine": True}]
)
def test_an_interrupted_run_ends_with_the_same_bytes(model_path, tmp_path, feedback):
    if feedback.get("refine") is True:
        feedback = feedback | {"refine": {"steps": 2, "batch": 5}}
    whole = run(model_path, tmp_path / "whole", keep=0.5, **feedback)

    def stop(phase, done, *_, **__):
        if phase == "factorise" and done == 2:  # two of three layers are finished
            raise Stopped

    with pytest.raises(Stopped):
        run(model_path, tmp_path / "parts", keep=0.5, progress=stop, **feedback)
    # as if the process had been killed between a layer's groups and the entry that says the layer is finished
    (tmp_path / "parts" / ".cospadi" / "layers" / "0001.safetensors").unlink()
    resumed = run(model_path, tmp_path / "parts", keep=0.5, **feedback)
    assert resumed.resumed == sum(group["layer"] == 0 for group in whole.report["groups"]) > 0
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    for one, other in zip(whole.report["layers"], resumed.report["layers"], strict=True):
        assert one["block_error"] == other["block_error"]
