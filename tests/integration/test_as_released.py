"""Checkpoints as they are released: renamed tensors, vision towers, heads, and tensors that no class takes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from cospadi import compress, estimate, evaluate, load
from cospadi.checkpoint import export_dense
from cospadi.evaluation import generate, inspect
from cospadi.report import model_card
from released import IMAGE, save_released
from tiny import save_tiny, tiny_text, token_ids

VISION = ("Gemma3ForConditionalGeneration", "Qwen3_5ForConditionalGeneration")
RENAMED = (*VISION, "NemotronHForCausalLM", "Lfm2ForCausalLM")
HEADS = ("LlamaForSequenceClassification", "LlamaForTokenClassification", "Qwen2ForSequenceClassification")
BASES = ("MistralModel", "Qwen3Model")
SMALL = {"calibration": {"seq_len": 64, "samples": 4}}


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(directory):
    return json.loads((directory / "config.json").read_text())


def outputs(model, **inputs):
    with torch.no_grad():
        return model(input_ids=token_ids(2, 9) % IMAGE, use_cache=False, **inputs)[0].float()


@pytest.fixture(scope="module", params=[*RENAMED, *HEADS, *BASES])
def compressed(request, tmp_path_factory):
    """Kind, the released checkpoint, and what became of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_released(folder / "released", request.param, tie_word_embeddings=False)
    compress(source, folder / "small", keep=0.6, method="rtn", calibration=[tiny_text()], recipe=SMALL)
    return request.param, source, folder / "small"


def test_the_result_opens_as_the_class_it_came_from(compressed):
    kind, source, small = compressed
    assert config(small)["architectures"] == config(source)["architectures"] == [kind]
    model, info = getattr(transformers, kind).from_pretrained(small, output_loading_info=True)
    assert not any(info.values())
    assert type(load(small)[0]) is type(model)


def test_everything_outside_the_compressed_layers_is_kept_byte_for_byte(compressed):
    kind, source, small = compressed
    before, after = (getattr(transformers, kind).from_pretrained(folder).state_dict() for folder in (source, small))
    dense = {name.removesuffix(".values") + ".weight" for name in after if name.endswith(".values")}
    assert dense <= before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name not in dense)


def test_the_dense_export_computes_the_same_under_the_released_names(compressed, tmp_path):
    kind, source, small = compressed
    export_dense(small, tmp_path / "dense")
    assert tensors(tmp_path / "dense").keys() == tensors(source).keys()
    assert config(tmp_path / "dense")["architectures"] == [kind]
    model = getattr(transformers, kind)
    expected = outputs(model.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    found = outputs(model.from_pretrained(small, dtype=torch.float32))
    assert torch.allclose(found, expected, atol=0.03 * float(expected.abs().max()))


def test_saved_again_by_transformers_it_is_the_same(compressed, tmp_path):
    kind, _, small = compressed
    model = getattr(transformers, kind).from_pretrained(small)
    model.save_pretrained(tmp_path / "again")
    first, second = tensors(small), tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = getattr(transformers, kind).from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("kind", VISION)
def test_a_vision_language_model_still_sees(kind, tmp_path):
    source = save_released(tmp_path / "released", kind)
    recipe = SMALL | {"options": {"bits": 8}}
    compress(source, tmp_path / "small", keep=0.6, method="rtn", calibration=[tiny_text()], recipe=recipe)
    dense, small = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("released", "small"))
    assert type(small).__name__ == type(dense).__name__ == kind
    with torch.no_grad():
        if kind.startswith("Gemma3"):
            pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
            inputs = {"input_ids": torch.tensor([[7, *[IMAGE] * 4, 9]]), "pixel_values": pixels}
            inputs["token_type_ids"] = torch.tensor([[0, 1, 1, 1, 1, 0]])
        else:
            pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)).bfloat16()
            inputs = {"input_ids": torch.tensor([[7, *[IMAGE] * 4, 9]]), "pixel_values": pixels}
            inputs |= {
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0]]),
            }
        expected, found = (model(**inputs).logits.float() for model in (dense, small))
        assert torch.allclose(found, expected, atol=0.1 * float(expected.abs().max()))
        blank = dense(**(inputs | {"pixel_values": torch.zeros_like(pixels)})).logits.float()
        assert not torch.allclose(expected, blank, atol=0.1 * float(expected.abs().max()))


def test_a_tied_classifier_keeps_its_head(tmp_path):
    source = save_released(
        tmp_path / "reward", "LlamaForSequenceClassification", tie_word_embeddings=True, num_labels=1
    )
    compress(source, tmp_path / "small", keep=0.6, method="rtn", calibration=[tiny_text()], recipe=SMALL)
    before, after = tensors(source), tensors(tmp_path / "small")
    assert torch.equal(before["score.weight"], after["score.weight"])
    assert config(tmp_path / "small")["architectures"] == ["LlamaForSequenceClassification"]
    assert estimate(source, keep=0.5, method="rtn", calibration={"seq_len": 64}).architecture.endswith("Classification")


def test_the_card_says_how_to_open_it(compressed):
    kind, _, small = compressed
    report = json.loads((small / "report.json").read_text())
    expected = "AutoModelForCausalLM" if kind.endswith("ForCausalLM") else kind
    card = model_card(report)
    assert (
        f"from transformers import {expected}, AutoTokenizer" in card and f"model = {expected}.from_pretrained" in card
    )
    assert ("pipeline_tag: text-generation" in card) == kind.endswith("ForCausalLM")
    assert report["generates"] == (kind not in (*HEADS, *BASES))


def test_a_vision_language_model_generates(tmp_path):
    source = save_released(tmp_path / "released", "Gemma3ForConditionalGeneration")
    compress(source, tmp_path / "small", keep=0.6, method="rtn", calibration=[tiny_text()], recipe=SMALL)
    assert generate(tmp_path / "small", "once", max_new_tokens=3)["tokens"] >= 1
    assert inspect(tmp_path / "small")["groups"]
    found = evaluate(tmp_path / "small", text=[tiny_text()], seq_len=64, against=source)
    assert found["perplexity"] > 1 and found["dense_perplexity"] > 1


def test_an_automatic_plan_for_a_vision_language_model(tmp_path):
    source = save_released(tmp_path / "released", "Qwen3_5ForConditionalGeneration")
    compress(source, tmp_path / "small", keep=0.4, calibration=[tiny_text()], recipe=SMALL)
    before, after = tensors(source), tensors(tmp_path / "small")
    vision = {name for name in before if "visual" in name}
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)


def test_a_class_that_serves_several_model_types_keeps_the_type_and_its_names(tmp_path):
    # EXAONE is a LlamaForCausalLM whose tensors have the names of GPT-2; the type of its configuration says so
    source = save_tiny(tmp_path / "exaone", "exaone", intermediate_size=44, num_key_value_heads=2)
    assert any(name.startswith("transformer.h.") for name in tensors(source))
    compress(source, tmp_path / "small", keep=0.6, method="rtn", calibration=[tiny_text()], recipe=SMALL)
    export_dense(tmp_path / "small", tmp_path / "dense")
    assert config(tmp_path / "dense")["model_type"] == config(source)["model_type"] == "exaone"
    assert tensors(tmp_path / "dense").keys() == tensors(source).keys()
    small, _ = load(tmp_path / "small", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.allclose(outputs(small), outputs(dense), atol=0.1)  # the export is rounded to bfloat16
    assert type(small.config) is type(dense.config)
