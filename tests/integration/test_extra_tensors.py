"""Tensors that a released checkpoint holds and its class does not take, such as heads for multi-token prediction."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cospadi import compress, estimate, load, prune
from cospadi.checkpoint import export_dense
from cospadi.engine.prune import plan_prune
from cospadi.errors import ModelError
from cospadi.recipe import Recipe, with_prune
from released import add_tensors, save_released
from tiny import tiny_text

SMALL = {"calibration": {"seq_len": 64, "samples": 4}}
MTP = {"mtp.fc.weight": torch.randn(24, 48).bfloat16(), "mtp.layers.0.norm.weight": torch.arange(24.0)}


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(directory):
    return json.loads((directory / "config.json").read_text())


def edit_config(directory, **changes):
    (directory / "config.json").write_text(json.dumps(config(directory) | changes))


def released(directory, kind="LlamaForCausalLM", extra=MTP):
    save_released(directory, kind)
    add_tensors(directory, extra)
    return directory


def squeezed(source, out, **changes):
    return compress(source, out, keep=0.6, method="rtn", calibration=[tiny_text()], recipe=SMALL, **changes)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_they_are_copied_byte_for_byte_and_travel_on(kind, tmp_path):
    source = released(tmp_path / "released", kind)
    edit_config(source, num_nextn_predict_layers=1)
    report = squeezed(source, tmp_path / "small").report
    told = [line for line in report["warnings"] if "mtp.fc.weight" in line]
    assert len(told) == 1 and "2 stored tensors" in told[0] and "copied unchanged" in told[0]
    assert config(tmp_path / "small")["num_nextn_predict_layers"] == 1
    load(tmp_path / "small")
    export_dense(tmp_path / "small", tmp_path / "dense")
    for directory in (tmp_path / "small", tmp_path / "dense"):
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        found = tensors(directory)
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in MTP.items()
        )
    assert report["file_bytes"] == sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))


def test_they_are_dropped_on_request_and_so_is_what_counts_them(tmp_path):
    source = released(tmp_path / "released")
    edit_config(source, num_nextn_predict_layers=1)
    report = squeezed(source, tmp_path / "small", drop_extra=True).report
    assert any("left out" in line for line in report["warnings"])
    assert not tensors(tmp_path / "small").keys() & MTP.keys()
    assert "num_nextn_predict_layers" not in config(tmp_path / "small")


def test_depth_pruning_copies_them_too(tmp_path):
    source = released(tmp_path / "released")
    prune(source, tmp_path / "pruned", method="shortgpt", blocks=1, calibration=[tiny_text()], recipe=SMALL)
    found = tensors(tmp_path / "pruned")
    assert all(torch.equal(found[name], tensor) for name, tensor in MTP.items())


def test_pruning_refuses_those_that_would_not_fit(tmp_path):
    source = released(tmp_path / "released", extra={"model.layers.3.eh_proj.weight": torch.ones(4, 8)})
    with pytest.raises(ModelError, match=r"model\.layers\.3\.eh_proj\.weight.*numbered as a block.*--drop-extra"):
        prune(source, tmp_path / "pruned", method="shortgpt", blocks=1, calibration=[tiny_text()], recipe=SMALL)
    with pytest.raises(ModelError, match="original width"):
        prune(source, tmp_path / "pruned", method="slicegpt", keep_blocks=0.7, calibration=[tiny_text()], recipe=SMALL)
    assert not (tmp_path / "pruned").exists()
    dropped = {**SMALL, "drop_extra": True}
    prune(source, tmp_path / "pruned", method="shortgpt", blocks=1, calibration=[tiny_text()], recipe=dropped)
    assert "model.layers.3.eh_proj.weight" not in tensors(tmp_path / "pruned")


def test_those_of_a_compressed_layer_are_refused_before_the_work(tmp_path):
    source = released(tmp_path / "released", extra={"model.layers.0.mlp.up_proj.bias": torch.ones(44)})
    with pytest.raises(ModelError, match=r"up_proj\.bias is of a layer that is compressed; pass --drop-extra"):
        squeezed(source, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    squeezed(source, tmp_path / "small", drop_extra=True)


def test_what_the_class_computes_itself_is_no_loss(tmp_path):
    source = released(tmp_path / "released", extra={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    report = squeezed(source, tmp_path / "small").report
    assert not report["warnings"]
    assert (tmp_path / "small" / "model.safetensors").exists()


def loaded_bytes(folder):
    """Bytes of all files but the report and its pages."""
    model = ("model", "config", "generation", "tokenizer", "special")
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith(model))


def test_a_target_size_holds_for_them_too(tmp_path):
    source = released(tmp_path / "released", extra={"mtp.fc.weight": torch.randn(100, 100)})
    plain = save_released(tmp_path / "plain", "LlamaForCausalLM")
    size = squeezed(plain, tmp_path / "small").report["file_bytes"]
    room = loaded_bytes(tmp_path / "small") + 48_000  # with an index
    assert size < room
    report = compress(
        source, tmp_path / "fits", target_size=str(room), method="rtn", calibration=[tiny_text()], recipe=SMALL
    ).report
    assert loaded_bytes(tmp_path / "fits") <= room
    assert report["recipe"]["target_size"] == str(room)


def test_a_dry_run_tells_of_them(tmp_path):
    source = released(tmp_path / "released")
    notes = estimate(source, rehearse=True, keep=0.6, method="rtn", calibration={"seq_len": 64}).notes
    assert any("mtp.fc.weight" in note for note in notes)


def test_a_dry_run_of_pruning_tells_of_them_too(tmp_path):
    recipe = with_prune(Recipe(calibration={"seq_len": 64}), "shortgpt", 1)
    source = released(tmp_path / "released")
    assert any("mtp.fc.weight" in line for line in plan_prune(source, recipe)["warnings"])
    bad = released(tmp_path / "bad", extra={"model.layers.3.eh_proj.weight": torch.ones(4, 8)})
    with pytest.raises(ModelError, match="--drop-extra"):
        plan_prune(bad, recipe)


def test_a_pruned_model_with_extra_tensors_can_be_compressed(tmp_path):
    source = released(tmp_path / "released")
    prune(source, tmp_path / "pruned", method="shortgpt", blocks=1, calibration=[tiny_text()], recipe=SMALL)
    squeezed(tmp_path / "pruned", tmp_path / "small")
    assert all(torch.equal(tensors(tmp_path / "small")[name], tensor) for name, tensor in MTP.items())
    assert load(tmp_path / "small")[0].config.num_hidden_layers == 2
