"""Runs on loss-weighted Grams: what solvers get, which runs agree, what is reported, and resumption."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from cospadi.calibration import StatisticsStore, averaged, blended, collect, token_weights
from cospadi.engine.allocate.candidates import solve_trial, task_of
from cospadi.engine.compress import compress
from cospadi.engine.estimate.estimate import estimate
from cospadi.engine.factorise import factorise_group
from cospadi.engine.plan.order import plain_share
from cospadi.engine.plan.plan import make_plan
from cospadi.engine.tune.streams import Streams
from cospadi.errors import RecipeError
from cospadi.evaluation import compare
from cospadi.methods import get_method
from cospadi.methods.representation import Representation
from cospadi.model_view import discover
from cospadi.recipe import Recipe
from runs import run_context
from tiny import save_tiny, tiny_model, tiny_text, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "m", "llama", dtype=torch.float32, num_hidden_layers=2)


def run(model_path, out, **settings):
    calibration = {"source": "a list of texts", "samples": 24, "seq_len": 32}
    recipe = Recipe(calibration=calibration, device="cpu").merged({"method": "pursuit", **settings})
    return compress(model_path, out, calibration=[tiny_text(4000, seed=1)], recipe=recipe)


def stored(out):
    return {file.name: file.read_bytes() for file in sorted(out.glob("model*.safetensors"))}


def changed_layers(first, second):
    tensors = [
        {k: v for file in sorted(out.glob("*.safetensors")) for k, v in load_file(file).items()}
        for out in (first, second)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    return {n.split(".layers.")[1][0] for n, t in tensors[0].items() if not torch.equal(t, tensors[1][n])}


@pytest.fixture
def context(tmp_path):
    view, ids = discover(tiny_model("qwen2")), token_ids(12, 20)
    weights = token_weights(view, ids, tmp_path / "w", seed=0)
    store = StatisticsStore(tmp_path / "s", {})
    collect(view, ids, store=store, weights=weights)
    return run_context(view, store, ids, weights=weights, plain_share=0.2)


def seen_by(method, context, recipe, monkeypatch):
    """The problems that a method's solver gets, by group name."""
    found = {}
    real = get_method(method).solve

    def solve(problem, spec, **options):
        found[problem.name] = problem
        return real(problem, spec, **options)

    from cospadi.methods.base import METHODS

    monkeypatch.setitem(METHODS.all(), method, replace(get_method(method), solve=solve))
    monkeypatch.setattr("cospadi.engine.factorise.get_method", lambda name: replace(get_method(name), solve=solve))
    infos = [factorise_group(context, group)[1] for group in make_plan(context.view, recipe).groups]
    return found, infos


def test_layers_that_share_a_dictionary_get_one_gram_and_others_one_each(context, monkeypatch):
    group = context.view.groups[0]
    assert len(group.modules) == 3
    known = context.store.load(group, group.modules)
    together = blended(known.mean_gram, averaged(list(known.loss.values())), 0.2)
    each = [blended(known.mean_gram, known.loss[name].gram, 0.2) for name in group.modules]
    found, _ = seen_by("pursuit", context, Recipe(keep=0.6, method="pursuit"), monkeypatch)
    (gram,) = found[group.name].grams
    torch.testing.assert_close(gram, together)
    assert not torch.allclose(gram, known.mean_gram, rtol=1e-2)
    found, _ = seen_by("gptq", context, Recipe(keep=0.4, method="gptq", grouping="siblings"), monkeypatch)
    assert len(found[group.name].grams) == 3
    for ours, expected in zip(found[group.name].grams, each, strict=True):
        torch.testing.assert_close(ours, expected)
    found, _ = seen_by("gptq", context, Recipe(keep=0.4, method="gptq"), monkeypatch)
    for name, expected in zip(group.modules, each, strict=True):
        (gram,) = found[name].grams
        torch.testing.assert_close(gram, expected)
    found, _ = seen_by("svd_llm", context, Recipe(keep=0.4, method="svd_llm", grouping="cross_layer"), monkeypatch)
    across = next(problem for problem in found.values() if len(problem.grams) == 2)
    assert torch.allclose(across.grams[0], each[0])


def test_errors_in_reports_are_those_of_the_plain_outputs(context, monkeypatch):
    recipe = Recipe(keep=0.4, method="rtn")  # which uses no Gram at all
    _, weighted = seen_by("rtn", context, recipe, monkeypatch)
    _, plain = seen_by("rtn", replace(context, weights=None, plain_share=1.0), recipe, monkeypatch)
    assert [info["error"] for info in weighted] == [info["error"] for info in plain]


def test_trials_of_integers_and_dictionaries_are_solved_and_measured_on_their_grams(context):
    group = make_plan(context.view, Recipe(keep=0.4, method="auto")).groups[0]
    known = context.read(group.source)
    task = task_of(context, group.spec, known, group.spec.shape.d_out)
    integers = Representation("gptq", {"bits": 3})
    spec = get_method("gptq").spec(group.spec.shape, group.spec.shape.dense_bytes, integers.options)
    trial, found = solve_trial(task, integers, spec)
    parts = zip(group.spec.modules, torch.split(found.double(), list(group.spec.shape.d_out), 1), strict=True)
    for missed, (name, part) in zip(trial.missed, parts, strict=True):
        gram = blended(known.mean_gram, known.loss[name].gram, 0.2)
        miss = context.view.weight(name).double() - part
        assert missed == pytest.approx(float((miss * (gram @ miss)).sum()), rel=1e-5)


@pytest.mark.parametrize("anchor", [False, True])
def test_the_compressed_stream_is_weighted_by_the_original_models_gradients(context, anchor):
    streams = Streams(context.view, context.ids, context.device, context.weights)
    generator = torch.Generator().manual_seed(4)
    streams.compressed = streams.original + 0.1 * torch.randn(streams.original.shape, generator=generator)
    group = context.view.of_layer(1)[0]
    seen = []
    handle = context.view.module(group.modules[0]).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    streams.run(1, streams.compressed)
    handle.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen]).double()
    loss = streams.moments(1, group, {}).loss if anchor else streams.statistics(1, [group])[group].loss
    for name, weights in context.weights.of(group.modules).items():
        expected = x.T @ (weights.values.double()[:, None] * x)
        torch.testing.assert_close(loss[name].gram, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "sequential"),
    [
        ("gptq", True),
        ("sparsegpt", False),
        ("pursuit", True),
        ("svd_llm", False),
        ("cospadi", False),
        ("geopair", False),
    ],
)
def test_methods_use_the_weights(model_path, tmp_path, method, sequential):
    options = {"options": {"rounds": 2}} if method == "cospadi" else {}
    settings = {"keep": 0.4, "method": method, "sequential": sequential, **options}
    run(model_path, tmp_path / "plain", gram="plain", **settings)
    found = run(model_path, tmp_path / "loss", gram="loss", **settings)
    if method != "geopair":  # other weights may pair other layers
        assert changed_layers(tmp_path / "plain", tmp_path / "loss") == {"0", "1"}
    assert found.report["gram"] == {"kind": "loss", "blend": 0.2}
    assert found.report["recipe"]["gram"] == "loss"


@pytest.mark.parametrize("settings", [{"method": "gptq"}, {"anchor": True}, {"method": "auto"}])
def test_a_blend_of_one_gives_the_plain_bytes(model_path, tmp_path, settings):
    run(model_path, tmp_path / "plain", keep=0.3, **settings)
    run(model_path, tmp_path / "one", keep=0.3, gram="loss", gram_blend=1.0, **settings)
    assert stored(tmp_path / "plain") == stored(tmp_path / "one")


class Stopped(Exception):
    pass


PHASES = {
    "gradients": "gradients/part-00000",
    "statistics": "statistics/loss-00000",
    "factorise": "groups/0001",
    "layers": "layers/0000",
}


@pytest.mark.parametrize(
    ("method", "more", "phase"),
    [
        ("gptq", {}, "gradients"),
        ("gptq", {}, "layers"),
        ("pursuit", {}, "statistics"),
        ("pursuit", {}, "factorise"),
        ("svd_llm", {"sequential": True}, "statistics"),
        ("svd_llm", {"anchor": True}, "layers"),
    ],
)
def test_a_run_that_is_stopped_ends_with_the_same_bytes(model_path, tmp_path, monkeypatch, method, more, phase):
    settings = {"keep": 0.4, "method": method, "gram": "loss", **more}
    whole = run(model_path, tmp_path / "whole", **settings)
    import cospadi.io as io

    real, stopped = io.os.replace, []

    def replaced(source, target, **options):
        real(source, target, **options)
        if PHASES[phase] in str(target) and not stopped:
            stopped.append(target)
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(io.os, "replace", replaced)
        with pytest.raises(Stopped):
            run(model_path, tmp_path / "again", **settings)
    again = run(model_path, tmp_path / "again", **settings)
    assert stored(tmp_path / "again") == stored(tmp_path / "whole")
    errors = [[group["error"] for group in result.report["groups"]] for result in (whole, again)]
    assert errors[0] == errors[1]
    assert not (tmp_path / "again" / ".cospadi").exists()


def test_the_kind_of_gram_belongs_to_the_run(model_path, tmp_path):
    run(model_path, tmp_path / "out", keep=0.4)
    with pytest.raises(Exception, match=r"recipe\.gram: unset → loss"):
        run(model_path, tmp_path / "out", keep=0.4, gram="loss")


def test_recipes_name_the_gram(tmp_path):
    recipe = Recipe(keep=0.5, gram="loss", gram_blend=0.35)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "r.yaml") == recipe and plain_share(recipe) == 0.35
    assert plain_share(Recipe(keep=0.5)) == plain_share(Recipe(keep=0.5, gram="plain")) == 1
    with pytest.raises(RecipeError, match="gram cannot be 'fisher': it must be 'plain' or 'loss'"):
        Recipe(gram="fisher")
    with pytest.raises(RecipeError, match=r"gram_blend cannot be 1\.5: it must be at most 1"):
        Recipe(gram_blend=1.5)


def test_a_method_may_publish_its_gram(monkeypatch):
    own = replace(get_method("pursuit"), gram="loss")
    monkeypatch.setattr("cospadi.engine.plan.order.get_method", lambda name: own)
    assert plain_share(Recipe(method="pursuit")) == 0.2
    assert plain_share(Recipe(method="pursuit", gram="plain")) == 1


def test_without_gradients_a_run_is_plain_and_says_so(model_path, tmp_path, monkeypatch):
    import sys

    from cospadi.calibration.token_weights import TokenWeights

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(sys.modules[TokenWeights.__module__], "squared_gradients", exhausted)
    found = run(model_path, tmp_path / "loss", keep=0.4, gram="loss")
    run(model_path, tmp_path / "plain", keep=0.4)
    assert stored(tmp_path / "plain") == stored(tmp_path / "loss")
    assert "memory" in found.report["gram"]["lacking"]
    assert any("all Grams are plain" in note for note in found.report["warnings"])


def test_pruned_first(model_path, tmp_path):
    settings = {"keep": 0.3, "gram": "loss", "prune": {"method": "shortgpt", "blocks": 1}}
    assert run(model_path, tmp_path / "out", **settings).report["gram"]["kind"] == "loss"


def test_rows_of_a_comparison_share_the_weights(model_path, tmp_path, monkeypatch):
    from cospadi.evaluation import comparison_row

    made, real = [], comparison_row.token_weights
    monkeypatch.setattr(comparison_row, "token_weights", lambda *a, **k: (made.append(k["progress"]), real(*a, **k))[1])
    text, calibration = [tiny_text(1200, seed=2)], [tiny_text(4000, seed=1)]
    base = Recipe(calibration={"samples": 24, "seq_len": 32}, device="cpu")
    found = compare(
        model_path, tmp_path / "c", methods=["pursuit"], keeps=[0.4], text=text, calibration=calibration, recipe=base,
        recipes={"weighted": Recipe(method="pursuit", gram="loss")}, references=[], seq_len=64, save=True,
    )  # fmt: skip
    plain, weighted = sorted(found["rows"], key=lambda row: row["method"] == "weighted")
    assert plain["perplexity"] != weighted["perplexity"] and len(made) == 1
    run(model_path, tmp_path / "alone", keep=0.4, gram="loss")
    ours = load_file(tmp_path / "alone" / "model.safetensors")
    theirs = load_file(tmp_path / "c" / "weighted-0.4" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_estimates_count_the_backward_pass_and_the_grams(model_path):
    plain, weighted = (
        estimate(model_path, {"keep": 0.4, "method": "pursuit", "gram": gram, "device": "cpu"})
        for gram in ("plain", "loss")
    )
    assert weighted.seconds["calibrate"] > plain.seconds["calibrate"]
    assert weighted.memory_bytes > plain.memory_bytes and weighted.flops > 2 * plain.flops
    assert json.dumps(weighted.to_dict())
