"""Refinement towards the predictions: the divergence falls, held-out text decides, and an interrupted run goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cospadi.engine.compress import compress
from cospadi.engine.tune import distill as predictions
from cospadi.engine.tune.distill import Predictions
from cospadi.engine.tune.tunable import TunableGroup
from cospadi.errors import RecipeError
from cospadi.model_view import LayerReplay, discover
from cospadi.recipe import Recipe
from tiny import save_tiny, tiny_model, tiny_text, token_ids

REFINE = {"steps": 4, "output_steps": 40}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "m", "llama", dtype=torch.float32)


def run(model_path, out, **changes):
    recipe = Recipe(method="pursuit", calibration={"samples": 24, "seq_len": 24}, options={"rounds": 3})
    settings = {"keep": 0.4, "calibration": [tiny_text(2000)], "device": "cpu", "refine": REFINE}
    return compress(model_path, out, recipe=recipe, **(settings | changes))


def problem(bits=16, count=6):
    from test_block_tuning import layer_setup

    streams, groups, _ = layer_setup(count=count, noise=0.0)
    view, ids = streams.view, streams.ids
    hidden = streams.original  # the input of layer 1
    for index in range(1, len(view.layers)):
        hidden = streams.run(index, hidden)
    tunable = [TunableGroup(spec, tensors, torch.bfloat16, torch.device("cpu")) for spec, tensors in groups]
    replay = LayerReplay(view)
    return Predictions(view, tunable, ids, hidden, replay), view, ids


def test_the_error_is_the_mean_divergence_from_the_original_model():
    found, view, ids = problem()
    chosen = torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = view.model(ids[chosen]).logits.double().log_softmax(-1)
        weights = found.weights()
        for name, weight in weights.items():
            view.model.get_parameter(name).copy_(weight)
        other = view.model(ids[chosen]).logits.double().log_softmax(-1)
        divergence = float((expected.exp() * (expected - other)).sum(-1).mean())
    assert divergence > 1e-3
    with torch.no_grad():
        assert found.error(chosen) == pytest.approx(divergence, rel=1e-3)


def test_parts_of_a_batch_add_up_to_its_gradient(monkeypatch):
    chosen = torch.arange(5)
    gradients = []
    for most in (1 << 27, 1):
        monkeypatch.setattr(predictions, "LOGITS", most)
        found, view, _ = problem()
        found.backward(chosen)
        gradients.append([k.tensor.grad for k in found.knobs])
        assert all(p.grad is None for p in view.model.parameters())
    for a, b in zip(*gradients, strict=True):
        assert bool(a.any()) and torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_divergence_falls_and_nothing_but_values_changes(model_path, tmp_path):
    plain = run(model_path, tmp_path / "plain", refine={"steps": 4})
    tuned = run(model_path, tmp_path / "tuned")
    numbers = tuned.report["predictions"]
    assert numbers["held_out_after"] < 0.97 * numbers["held_out_before"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tuned"))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("values" in key or "dictionary" in key for key in changed), changed
    assert tuned.report["bytes_after"] == plain.report["bytes_after"]
    assert [g["error"] for g in tuned.report["groups"]] != [g["error"] for g in plain.report["groups"]]
    assert "predictions" not in plain.report


def test_it_never_makes_the_predictions_worse(model_path, tmp_path, monkeypatch):
    run(model_path, tmp_path / "plain", refine={"steps": 4})
    monkeypatch.setattr(predictions, "FIRST_RATE", 1e4)
    tuned = run(model_path, tmp_path / "tuned")
    assert tuned.report["predictions"]["rate"] is None
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tuned"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("when", ["before", "between"])
def test_an_interrupted_run_ends_with_the_same_bytes(model_path, tmp_path, monkeypatch, when):
    from cospadi.engine import journal
    from cospadi.engine.tune import sequential as feedback

    run(model_path, tmp_path / "whole")
    if when == "before":
        original = feedback.refine_predictions
        monkeypatch.setattr(feedback, "refine_predictions", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    else:  # all groups are tuned, and durable together, but only some of them by themselves
        original = journal.Section.write

        def write(self, index, tensors, info):
            if self.folder.name == "groups" and (self.folder.parent / "predictions").exists() and index == 2:
                raise KeyboardInterrupt
            original(self, index, tensors, info)

        monkeypatch.setattr(journal.Section, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(model_path, tmp_path / "cut")
    monkeypatch.undo()
    again = run(model_path, tmp_path / "cut")
    assert again.resumed > 0
    for name in ("whole", "cut"):
        shutil.copy(tmp_path / name / "model.safetensors", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    errors = [
        [g["error"] for g in json.loads((tmp_path / name / "report.json").read_text())["groups"]]
        for name in ("whole", "cut")
    ]
    assert errors[0] == pytest.approx(errors[1])


def test_integers_are_tuned_too(model_path, tmp_path):
    options = {"value_bits": 4, "dictionary_bits": 4, "group": 16, "rounds": 3}
    tuned = run(model_path, tmp_path / "tuned", options=options, keep=0.3)
    numbers = tuned.report["predictions"]
    assert numbers["held_out_after"] < numbers["held_out_before"]


def test_the_recipe_refuses_negative_steps():
    with pytest.raises(RecipeError, match="output_steps"):
        Recipe().merged({"refine": {"output_steps": -1}})


def test_other_architectures_give_their_predictions():
    for architecture in ("qwen3", "gemma3_text", "opt"):
        view = discover(tiny_model(architecture))
        ids = token_ids(3, 9)
        with torch.no_grad():
            replay = LayerReplay(view)
            hidden = replay.embed(ids)
            for index in range(len(view.layers)):
                hidden = replay.layer(index, hidden)
            found = Predictions(view, [], ids, hidden, replay)
            assert found.part >= 1
            assert torch.allclose(replay.logits(ids, hidden), view.model(ids).logits, atol=1e-4)
