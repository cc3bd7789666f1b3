"""Two streams, the anchored target, and the layer-by-layer run: numbers against direct computation, and resumption."""

from dataclasses import replace
from functools import partial

import pytest
import torch
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


@pytest.mark.parametrize("feedback", [{"anchor": True}, {"refine": {"steps": 3}}, {"anchor": True, "refine": True}])
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
