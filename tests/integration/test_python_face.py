"""What a Python user does: compress a model that is in memory, look at what comes back, and go on with it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import cospadi
from command import command, weights
from cospadi import ModelError
from tiny import bos_tokenizer, byte_tokenizer, save_tiny, tiny_config, tiny_model, tiny_text

TEXT = [tiny_text(3000)]
BRIEF = {"calibration": TEXT, "samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama", tie_word_embeddings=True)


@pytest.fixture
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny)


def state(model):
    """Everything about a model that a run could change."""
    tensors = {name: (t.data_ptr(), t.dtype, t.device, t.requires_grad, t.clone()) for name, t in every(model)}
    return tensors, [(name, type(m), m.training) for name, m in model.named_modules()], model.config.to_dict()


def every(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def assert_same(model, before):
    tensors, modules, config = state(model)
    assert modules == before[1] and config == before[2] and tensors.keys() == before[0].keys()
    for name, (*place, values) in tensors.items():
        assert place == list(before[0][name][:-1]) and torch.equal(values, before[0][name][-1]), name


@pytest.fixture
def unchanged(model):
    """The model in a mixture of modes, with frozen weights and gradients; afterwards it is the same."""
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].requires_grad_(False)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    gradient = model.model.norm.weight.grad.clone()
    before = state(model)
    yield model
    assert_same(model, before)
    assert torch.equal(model.model.norm.weight.grad, gradient)


def test_a_model_in_memory_gives_the_same_bytes_as_its_directory(tiny, unchanged, tmp_path):
    by_name = cospadi.compress(tiny, tmp_path / "a", method="svd", keep=0.7, **BRIEF)
    done = cospadi.compress(unchanged, tmp_path / "b", tokenizer=byte_tokenizer(), method="svd", keep=0.7, **BRIEF)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert by_name.report["model"] == done.report["model"] == "tiny"
    files = {path.name for path in (tmp_path / "b").iterdir()}
    assert files == {path.name for path in (tmp_path / "a").iterdir()}
    assert {"report.html", "README.md", "recipe.yaml", "config.json", "tokenizer.json"} <= files
    again = cospadi.compress(unchanged, tmp_path / "b", tokenizer=tiny, method="svd", keep=0.7, **BRIEF)
    assert again.complete and again.report["keep_actual"] == done.keep_actual


@pytest.mark.parametrize("method", ["gptq", "masa"])
def test_runs_that_edit_the_model_edit_a_copy(unchanged, tmp_path, method):
    share = {"gptq": 0.3, "masa": 0.9}[method]
    cospadi.compress(unchanged, tmp_path / "o", tokenizer=byte_tokenizer(), method=method, keep=share, **BRIEF)
    model, _ = cospadi.load(tmp_path / "o")
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_pruning_and_estimates_of_a_model_in_memory(tiny, unchanged, tmp_path):
    result = cospadi.prune(unchanged, tmp_path / "cut", tokenizer=tiny, method="uidl", blocks=1, **BRIEF)
    assert result.report["blocks_after"] == 2 and len(result.removed) == 1
    assert (tmp_path / "cut/report.html").is_file()
    assert repr(result).startswith(f"<PruneResult {tmp_path}/cut: tiny by uidl · 3 → 2 blocks")
    figures = cospadi.estimate(unchanged, keep=0.6, method="rtn").to_dict()
    expected = cospadi.estimate(tiny, keep=0.6, method="rtn").to_dict()
    assert {**figures, "seconds": 0} == {**expected, "seconds": 0}


def test_measuring_models_in_memory(tiny, unchanged, tmp_path):
    tokenizer = byte_tokenizer()
    limits = {"text": TEXT, "seq_len": 64, "max_blocks": 2}
    found = cospadi.evaluate(unchanged, tokenizer=tokenizer, against=tiny, **limits)
    assert found["perplexity"] == found["dense_perplexity"] and found["model"] == found["dense_model"] == "tiny"
    other = cospadi.evaluate(tiny, against=unchanged, tokenizer=tokenizer, **limits)
    assert other["perplexity"] == other["dense_perplexity"] == found["perplexity"]
    said = cospadi.generate(unchanged, "ab", tokenizer=tokenizer, max_new_tokens=3)
    assert said["text"] == cospadi.generate(tiny, "ab", max_new_tokens=3)["text"]
    with pytest.raises(ModelError, match="has its own"):
        cospadi.evaluate(tiny, tokenizer=tokenizer, **limits)


def test_compare_takes_the_options_of_its_command(tiny, unchanged, tmp_path):
    settings = {"methods": "svd", "keep": "80%", "references": [], "eval_seq_len": 64, "max_blocks": 1, **BRIEF}
    found = cospadi.compare(unchanged, tmp_path / "c", tokenizer=byte_tokenizer(), text=TEXT, **settings)
    assert [(row["method"], row["keep"]) for row in found["rows"]] == [("svd", 0.8)] and found["model"] == "tiny"
    assert {"csv", "json", "html"} <= set(found["files"])
    assert all((tmp_path / "c" / name).is_file() for name in found["files"].values())
    assert repr(found).startswith("<Comparison tiny: dense ") and "svd 0.8: " in repr(found)
    assert "<td>svd</td>" in found._repr_html_()


def test_options_of_the_text_go_to_every_function(tmp_path):
    model, tokenizer = tiny_model("llama", vocab_size=258), bos_tokenizer()
    given = {"tokenizer": tokenizer, "text_field": "body", "bos": "off"}
    brief = {"samples": 4, "seq_len": 32}

    def records():
        return ({"body": text} for text in TEXT)

    first = cospadi.compress(model, tmp_path / "a", method="svd", keep=0.7, calibration=records(), **given, **brief)
    told = first.report["calibration"]
    assert (told["source"], told["fields"], told["begins_with"]) == ("a generator", ["body"], "")
    cut = cospadi.prune(model, tmp_path / "b", method="uidl", blocks=1, calibration=records(), **given, **brief)
    assert (cut.report["calibration"]["fields"], cut.report["calibration"]["begins_with"]) == (["body"], "")
    measure = {"text": records(), "max_blocks": 2}
    found = cospadi.evaluate(model, against=tmp_path / "a", seq_len=64, **measure, **given)
    assert (found["fields"], found["bos"], found["begins_with"]) == (["body"], "off", "")
    rows = cospadi.compare(
        model, tmp_path / "c", methods="svd", keep=0.7, references=(), eval_seq_len=64, calibration=records(),
        **measure | {"text": records()}, **given, **brief,
    )  # fmt: skip
    assert (rows["calibration"]["fields"], rows["calibration"]["begins_with"]) == (["body"], "")
    assert rows["dense"]["perplexity"] == pytest.approx(found["perplexity"], rel=0.02)
    counts = [cospadi.generate(model, "ab", tokenizer=tokenizer, bos=bos)["prompt_tokens"] for bos in ("off", "on")]
    assert counts == [2, 3]


def test_a_model_in_memory_needs_no_text_where_nothing_reads_it(tmp_path):
    model, tokenizer = tiny_model("llama", max_position_embeddings=64), byte_tokenizer()
    small = cospadi.compress(model, tmp_path / "a", tokenizer=tokenizer, method="rtn", bits=4, keep=0.4)
    cut = cospadi.prune(model, tmp_path / "b", tokenizer=tokenizer, method="magnitude", blocks=1)
    assert small.report["calibration"] is cut.report["calibration"] is None
    limits = {"text": TEXT, "eval_seq_len": 64, "max_blocks": 1, "references": ()}
    rows = cospadi.compare(model, tmp_path / "c", tokenizer=tokenizer, methods="rtn,random", keep=0.4, **limits)
    assert rows["calibration"] is None and len(rows["rows"]) == 2
    assert "calibrate" not in cospadi.estimate(model, method="rtn", keep=0.4).seconds
    read = cospadi.estimate(model, method="rtn", keep=0.4, calibration=TEXT, samples=4, seq_len=32)
    assert read.seconds["calibrate"] > 0


def test_the_kind_of_gram_is_an_option(tiny, tmp_path):
    result = cospadi.compress(tiny, tmp_path / "a", method="svd_llm", keep=0.7, gram="loss", gram_blend=0.4, **BRIEF)
    assert result.report["gram"] == {"kind": "loss", "blend": 0.4}
    plain, loss = (cospadi.estimate(tiny, method="svd_llm", keep=0.7, gram=kind) for kind in ("plain", "loss"))
    assert loss.flops > plain.flops


def test_a_model_without_a_name_is_called_by_its_class(tmp_path):
    model = tiny_model("qwen3")
    result = cospadi.compress(model, tmp_path / "o", tokenizer=byte_tokenizer(), method="rtn", keep=0.4, **BRIEF)
    assert result.report["model"] == "Qwen3ForCausalLM"
    model.name_or_path = "/somewhere/that/is/gone"
    assert cospadi.estimate(model, method="rtn", keep=0.4).model == "gone"


def test_a_size_of_all_files_counts_the_tokenizer_of_a_model_in_memory(tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    model.name_or_path = model.config.name_or_path = "/somewhere/that/is/gone"
    asked = {"method": "rtn", "target_size": "210kB", "calibration": TEXT, "samples": 4, "seq_len": 32}
    assert cospadi.estimate(model, **asked).plan.keep_actual < 1
    cospadi.compress(model, tmp_path / "o", tokenizer=byte_tokenizer(), **asked)
    names = ("model", "config", "generation", "tokenizer", "special")
    assert 200_000 < sum(f.stat().st_size for f in (tmp_path / "o").iterdir() if f.name.startswith(names)) <= 210_000


def test_a_classifier_in_memory_is_compressed_as_one(tmp_path):
    from transformers import LlamaForSequenceClassification

    model, tokenizer = LlamaForSequenceClassification(tiny_config("llama", num_labels=2)), byte_tokenizer()
    model.config.architectures = ["LlamaForCausalLM"]  # as it was when it was loaded
    cospadi.compress(model, tmp_path / "o", tokenizer=tokenizer, method="rtn", keep=0.5)
    small, _ = cospadi.load(tmp_path / "o")
    assert type(small) is LlamaForSequenceClassification
    assert cospadi.estimate(model, method="rtn", keep=0.5).architecture == "LlamaForSequenceClassification"
    with pytest.raises(ModelError, match="evaluate needs predictions of the next token"):
        cospadi.evaluate(model, tokenizer=tokenizer, text=TEXT)
    with pytest.raises(ModelError, match="generate needs predictions of the next token"):
        cospadi.generate(model, "a", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="a comparison needs predictions of the next token"):
        cospadi.compare(model, tmp_path / "c", tokenizer=tokenizer, methods="rtn", keep=0.5, text=TEXT)
    with pytest.raises(ModelError, match="gram 'loss' needs predictions"):
        cospadi.estimate(model, method="svd_llm", keep=0.5, gram="loss")


def test_a_copy_keeps_ties_and_leaves_hooks_behind(model, tiny):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from cospadi.model_view import model_source

    add_hook_to_module(model.model.layers[0], AlignDevicesHook("cpu"))
    made = model_source(torch.compile(model), tiny).copied()
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert not any(hasattr(module, "_hf_hook") for module in made.modules())
    assert hasattr(model.model.layers[0], "_hf_hook")


def test_models_in_memory_that_cannot_be_used(model, tiny, tmp_path):
    def refused(given, words, tokenizer=None):
        with pytest.raises(ModelError, match=words) as caught:
            cospadi.compress(given, tmp_path / "o", tokenizer=tokenizer or byte_tokenizer(), keep=0.5, **BRIEF)
        assert "\n" not in str(caught.value) and not (tmp_path / "o").exists()

    refused(nn.Linear(2, 2), "not a Linear")
    sizes = {"vocab_size": 258, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    refused(T5ForConditionalGeneration(T5Config(**sizes)), "encoder-decoder model")
    refused(tiny, "a directory or hub id has its own")
    refused(model, "not a dict: load it with AutoTokenizer", {"input_ids": []})
    adapted = nn.Module()
    adapted.merge_and_unload = lambda: None
    refused(adapted, "what its merge_and_unload")
    offloaded = copy.deepcopy(model)
    offloaded.model.layers[0].to("meta")
    refused(offloaded, "it is offloaded.*: load the model without device_map")
    model._hf_peft_config_loaded = True
    refused(model, "has an adapter: merge it first")
    model._hf_peft_config_loaded = False
    model.is_quantized = True
    refused(model, "quantised already")
    cospadi.compress(tiny, tmp_path / "small", method="svd", keep=0.7, **BRIEF)
    small, tokenizer = cospadi.load(tmp_path / "small")
    refused(small, "already compressed by cospadi", tokenizer)


def test_results_are_short_and_safe(tiny, tmp_path):
    place = save_tiny(tmp_path / "<b>&model")
    result = cospadi.compress(place, tmp_path / "<i>out", method="rtn", bits=4, keep=0.5, **BRIEF)
    assert result.report["recipe"]["options"] == {"bits": 4}
    assert repr(result).count("\n") == 0 and len(repr(result)) < 200 + len(str(tmp_path))
    assert "<b>&model by rtn · " in repr(result) and "% kept" in repr(result)
    shown = [
        result,
        cospadi.estimate(place, keep=0.5),
        cospadi.evaluate(result.out, text=TEXT, seq_len=64, against=place),
        cospadi.inspect(result.out),
        cospadi.inspect(place),
        cospadi.export(result.out, tmp_path / "<u>dense"),
        cospadi.generate(result.out, "<p>", max_new_tokens=2),
        cospadi.doctor(),
    ]
    for item in shown:
        page = item._repr_html_()
        assert page.startswith('<div class="cospadi">') and page.rstrip().endswith("</div>")
        for tag in ("<script", "<b>&model", "<i>out", "<u>dense", "<p>", "http:", "https:", "url(", "<link", "<img"):
            assert tag not in page, (tag, item)
        assert len(repr(item)) < 300 + len(str(tmp_path)) and "\n" not in repr(item)
        if isinstance(item, dict):
            assert json.loads(json.dumps(item)) == dict(item)
    assert (tmp_path / "<u>dense/model.safetensors").is_file()
    with pytest.raises(cospadi.OutputError, match="not empty"):
        cospadi.export(result.out, tmp_path / "<u>dense")


def test_a_benchmark_takes_lists_and_text(tmp_path):
    place = save_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=96, head_dim=16)
    limits = {"tokens": [1], "layers": 1, "prompt": 8, "quick": True, "whole": False, "device": "cpu"}
    found = cospadi.benchmark(place, keep=["0.8:16"], out=tmp_path / "speed", **limits)
    assert {row["keep"] for row in found["layers"]} == {0.8} and "json" in found["files"]
    assert repr(found).startswith("<Speed on cpu") and "one token" not in repr(found)
    with pytest.raises(cospadi.RecipeError, match="bits '5': give some of 16,8,4,3,2"):
        cospadi.benchmark(place, bits=5)


def test_nothing_is_printed_where_nobody_looks(tiny, tmp_path, capfd):
    cospadi.compress(tiny, tmp_path / "o", method="rtn", keep=0.5, **BRIEF)
    printed = capfd.readouterr()
    assert "calibrate" not in printed.out + printed.err and "factorise" not in printed.out + printed.err
    events = []
    cospadi.prune(tiny, tmp_path / "p", method="uidl", blocks=1, progress=lambda *event: events.append(event), **BRIEF)
    assert {event[0] for event in events} >= {"read", "save"}
    with pytest.raises(cospadi.RecipeError, match="progress must be 'auto'"):
        cospadi.compress(tiny, tmp_path / "q", keep=0.5, progress="loud", **BRIEF)


def test_the_command_and_the_function_write_the_same_directory(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0], encoding="utf-8")
    run = ["compress", tiny, tmp_path / "a", "--method", "rtn", "--keep", 0.5, "--set", "bits=4", "--json"]
    done = command(*run, "--calibration", text, "--samples", 4, "--seq-len", 32)
    assert done.code == 0, done.err
    cospadi.compress(tiny, tmp_path / "b", method="rtn", keep=0.5, bits=4, **(BRIEF | {"calibration": Path(text)}))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert (tmp_path / "a/recipe.yaml").read_text() == (tmp_path / "b/recipe.yaml").read_text()


def test_a_model_of_another_float_type_is_estimated_as_it_is():
    model = tiny_model(dtype=torch.bfloat16)
    assert tiny_config().dtype != torch.float32 or model.dtype == torch.bfloat16
    half = cospadi.estimate(model, method="rtn", keep=0.5).to_dict()["other_bytes"]
    assert cospadi.estimate(model.float(), method="rtn", keep=0.5).to_dict()["other_bytes"] == 2 * half
