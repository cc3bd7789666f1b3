"""What could fail at the end of a run is tried at its start, and a result is opened before it is called finished."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from cospadi import compress, estimate, evaluate, prune
from cospadi.checkpoint import format_for, save
from cospadi.checkpoint.fitting import fit
from cospadi.engine import rehearsal
from cospadi.errors import CheckpointError, ModelError
from cospadi.evaluation import generate
from cospadi.evaluation.compare import compare
from cospadi.format import GroupSpec, MatrixSpec
from cospadi.methods import all_methods
from cospadi.model_view import skeleton
from released import save_released
from tiny import byte_tokenizer, save_tiny, tiny_model, tiny_text

SMALL = {"calibration": {"seq_len": 64, "samples": 4}}


def squeezed(source, out, **changes):
    return compress(
        source, out, **({"keep": 0.6, "method": "rtn", "calibration": [tiny_text()]} | changes), recipe=SMALL
    )


@pytest.fixture
def unopenable(monkeypatch):
    """An architecture whose initialiser does not get along with compressed layers."""
    kind = transformers.LlamaPreTrainedModel
    original = kind._init_weights

    def touching(self, module):
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
            raise AttributeError("this layer has no weight")
        original(self, module)

    monkeypatch.setattr(kind, "_init_weights", touching)


@pytest.fixture
def worked(monkeypatch):
    """Whether statistics were collected."""
    done = []
    monkeypatch.setattr("cospadi.engine.inputs.collect", lambda *a, **k: done.append(1))
    return done


def test_a_result_that_nothing_could_open_is_refused_before_the_work(tmp_path, unopenable, worked):
    source = save_tiny(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"could not be saved and opened \(.*no weight.*nothing was computed"
    ) as caught:
        squeezed(source, tmp_path / "out")
    assert "\n" not in str(caught.value) and not worked
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="nothing was computed"):
        estimate(source, rehearse=True, keep=0.6, method="rtn", calibration={"seq_len": 64})


def test_a_result_that_cannot_be_opened_is_not_called_finished(tmp_path, unopenable):
    model = tiny_model(dtype=torch.bfloat16)
    modules = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
    spec = GroupSpec(modules, 24, (44, 44), MatrixSpec(88, 24, nonzeros=24, bits=8))
    format_for(spec).replace(model, [spec])
    with pytest.raises(CheckpointError, match=r"the result cannot be opened as LlamaForCausalLM \(.*no weight"):
        save(model, byte_tokenizer(), tmp_path / "out", [spec])
    assert not [*(tmp_path / "out").glob("*")]


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_every_method_passes(tmp_path, method):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    source = save_tiny(tmp_path / "model", **shape)
    found = estimate(source, rehearse=True, keep=0.4, method=method, calibration={"samples": 4, "seq_len": 32})
    assert found.plan.keep_actual <= 0.4


def test_what_cannot_be_saved_is_found_at_the_start(tmp_path, monkeypatch, worked):
    source = save_tiny(tmp_path / "model")

    def failing(*_, **__):
        raise ValueError("the tokenizer's template is broken")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", failing)
    for run in (squeezed, lambda *a: prune(*a, method="shortgpt", blocks=1, calibration=[tiny_text()], recipe=SMALL)):
        with pytest.raises(ModelError, match="template is broken"):
            run(source, tmp_path / "out")
    assert not worked


@pytest.mark.parametrize("method", ["rtn", "svd", "cospadi", "sparsegpt", "basis_sharing", "gptq"])
def test_a_small_model_of_the_same_kinds_is_written_opened_and_run(tmp_path, monkeypatch, method):
    written = []
    original = rehearsal.write_model
    monkeypatch.setattr(rehearsal, "write_model", lambda model, *a: (written.append(model.config), original(model, *a)))
    source = save_tiny(tmp_path, num_hidden_layers=6)
    before = torch.random.get_rng_state()
    estimate(source, rehearse=True, keep=0.6, method=method, calibration={"seq_len": 64})
    assert [config.num_hidden_layers for config in written] == [2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_small_model_has_a_block_of_every_kind(tmp_path, monkeypatch):
    written = []
    original = rehearsal.write_model
    monkeypatch.setattr(rehearsal, "write_model", lambda model, *a: (written.append(model.config), original(model, *a)))
    source = save_released(tmp_path, "NemotronHForCausalLM")
    estimate(source, rehearse=True, keep=0.6, method="rtn", calibration={"seq_len": 64})
    assert {*written[0].layer_types} == {"linear_attention", "full_attention", "mlp"}


def test_fitting_a_large_model_takes_no_memory():
    config = AutoConfig.for_model("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    config.architectures = ["LlamaForCausalLM"]
    stored = {name: (tuple(t.shape), torch.bfloat16) for name, t in skeleton(config).state_dict().items()}
    found = fit(config, stored)
    assert not found.fault and not found.extra and found.model.num_parameters() > 60e9
    stored.pop("model.layers.7.mlp.up_proj.weight")
    stored["model.norm.weight"] = ((8191,), torch.bfloat16)
    assert "model.layers.7.mlp.up_proj.weight is missing" in fit(config, stored).fault


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"method": "auto"}, "the default of method 'auto'"),
        ({"method": "rtn", "allocation": "knapsack"}, "allocation 'knapsack' needs"),
        ({"method": "fwsvd"}, "method 'fwsvd' needs"),
        ({"method": "masa"}, "method 'masa'"),
        ({"method": "svd", "refine": {"output_steps": 4}}, "tuning to the predictions needs"),
    ],
)
def test_what_needs_a_language_models_loss_says_so_before_the_work(tmp_path, worked, recipe, what):
    source = save_released(tmp_path / "reward", "LlamaForSequenceClassification", num_labels=1)
    with pytest.raises(ModelError, match=what) as caught:
        squeezed(source, tmp_path / "out", **recipe)
    assert "LlamaForSequenceClassification" in str(caught.value) and not worked
    with pytest.raises(ModelError, match=what):
        estimate(source, keep=0.6, calibration={"seq_len": 64}, **recipe)


def test_measuring_a_classifier_as_a_language_model_is_refused(tmp_path):
    source = save_released(tmp_path / "base", "MistralModel")
    for run in (
        lambda: evaluate(source, text=[tiny_text()]),
        lambda: generate(source, "once"),
        lambda: compare(
            source, tmp_path / "out", methods=["rtn"], keeps=[0.6], text=[tiny_text()], calibration=[tiny_text()]
        ),
    ):
        with pytest.raises(ModelError, match="predictions of the next token, which MistralModel does not make"):
            run()


@pytest.mark.parametrize("method", ["sleb", "replaceme"])
def test_pruning_by_the_loss_is_refused_too(tmp_path, method):
    source = save_released(tmp_path / "base", "MistralModel")
    with pytest.raises(ModelError, match=f"{method}.* needs predictions"):
        prune(source, tmp_path / "out", method=method, blocks=1, calibration=[tiny_text()], recipe=SMALL)


@pytest.mark.parametrize("kind", ["MistralModel", "LlamaForSequenceClassification", "Gemma3ForConditionalGeneration"])
def test_depth_pruning_keeps_the_class(tmp_path, kind):
    source = save_released(tmp_path / "model", kind)
    prune(source, tmp_path / "out", method="shortgpt", blocks=1, calibration=[tiny_text()], recipe=SMALL)
    model, info = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.config.get_text_config().num_hidden_layers == 2
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [kind]


def test_the_stream_of_a_vision_language_model_is_not_narrowed(tmp_path):
    source = save_released(tmp_path / "model", "Gemma3ForConditionalGeneration")
    with pytest.raises(ModelError, match="write into the residual stream"):
        prune(source, tmp_path / "out", method="slicegpt", keep_blocks=0.7, calibration=[tiny_text()], recipe=SMALL)
