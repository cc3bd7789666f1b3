"""PEFT on compressed models: what trains, what is stored, what merges and what is refused."""

import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    GraloraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from checkpoints.factory import KINDS, compress_randomly, make_spec, random_factors
from cospadi.checkpoint import attach, export_dense, load, save
from cospadi.checkpoint.formats.factored import FACTORED
from cospadi.checkpoint.formats.shared import SHARED
from cospadi.errors import ModelError
from cospadi.format import SharedSpec
from cospadi.layers import ComputedLinear
from tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ids = torch.arange(20).reshape(2, 10)
EXACT = {
    "low_rank": ("low_rank",),
    "free16": ("free16",),
    "runs16": ("runs16",),
    "mixed": ("low_rank", "free16", "runs16"),
}


@pytest.fixture(autouse=True)
def runs_of_four(monkeypatch):
    monkeypatch.setitem(KINDS, "runs16", ({"pattern": "3:4"}, {}))


def factored(*kinds, **options):
    model = tiny_model("llama", **options)
    attach(model, compress_randomly(model, kinds or ("free16", "rounded4", "balanced8", "pruned", "zeros3")))
    return model


def shared(atoms=1, **options):
    """Shared atoms in all o projections; the other layers stay dense. With three atoms each keeps its own matrix."""
    model = tiny_model("llama", **options)
    names = tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(3))
    spec = SharedSpec(names, 24, 24, atoms, (0, 0, 0) if atoms == 3 else (2, 0, 3))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{index}.{leaf}": (torch.randn(shape, generator=generator) / 5).bfloat16()
        for index in range(3)
        for leaf, (shape, _) in spec.tensors(index).items()
    }
    SHARED.install(model, spec, tensors)
    attach(model, [spec])
    return model


def partly():
    """One compressed layer in the last block; all that come before it are dense."""
    model = tiny_model("llama")
    spec = make_spec("rounded4", ["model.layers.2.mlp.down_proj"], 44, (24,))
    FACTORED.install(model, spec, random_factors(spec).pack(spec, torch.bfloat16))
    attach(model, [spec])
    return model


def adapted(model, config=None, **options):
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    return get_peft_model(model, config or LoraConfig(task_type="CAUSAL_LM", **(defaults | options)))


def trained(model, steps=3, rate=3e-2):
    """Losses of a few steps; the model is in evaluation mode afterwards."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model):
    return model(ids).logits


def adapted_names(model):
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "base_layer")}


def linear_names(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "head" not in name
    }


@pytest.mark.parametrize("make", [factored, shared, partly])
def test_all_linear_finds_compressed_layers_beside_dense_ones(make):
    model = make()
    expected = linear_names(model)
    assert len(expected) == 21 and any(isinstance(m, ComputedLinear) for m in model.modules())
    assert adapted_names(adapted(model)) == expected


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], r".*layers\.[02]\.(self_attn\.q|mlp\.down)_proj"])
def test_targets_by_name_and_by_pattern(target):
    found = adapted_names(adapted(factored(), target_modules=target))
    assert len(found) == (6 if isinstance(target, list) else 4)
    assert all(name.endswith(("q_proj", "down_proj")) for name in found)


CONFIGS = {
    "lora": lambda: LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=3, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lokr": lambda: LoKrConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "adalora": lambda: AdaLoraConfig(init_r=4, total_step=9, target_modules="all-linear", task_type="CAUSAL_LM"),
    "gralora": lambda: GraloraConfig(r=8, gralora_k=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "shira": lambda: ShiraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    "supertuning": lambda: SupertuningConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_train_reload_and_are_never_lost_by_merging(config, tmp_path):
    model = adapted(factored(), config())
    losses = trained(model, rate=0.1)
    assert losses[-1] < losses[0]
    found = logits(model)
    assert (found - logits(factored())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(factored(), tmp_path)
    torch.testing.assert_close(logits(again), found, rtol=1e-5, atol=1e-5)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match=r"Nothing was merged.*cospadi export"):
            merge()
        torch.testing.assert_close(logits(model), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [factored, shared])
def test_reloads_on_the_compressed_checkpoint_and_on_its_export(make, tmp_path):
    source = make(dtype=torch.bfloat16)
    kind = FACTORED if make is factored else SHARED
    save(source, None, tmp_path / "small", kind.parse(source.config.quantization_config.to_dict()))
    export_dense(tmp_path / "small", tmp_path / "dense", dtype="float32")
    model = adapted(load(tmp_path / "small", dtype=torch.float32))
    trained(model)
    found = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), found)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    exported = PeftModel.from_pretrained(dense, tmp_path / "adapter")
    torch.testing.assert_close(logits(exported), found, rtol=1e-4, atol=1e-4)
    merged = exported.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj", "down_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("kinds", EXACT.values(), ids=EXACT)
def test_lora_merges_exactly_as_atoms_and_codes(kinds, target, tmp_path):
    model = adapted(factored(*kinds), target_modules=target)
    trained(model)
    found, base = logits(model), logits(factored(*kinds))
    assert (found - base).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(logits(model), found)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), found)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    merged = model.merge_and_unload()
    assert not any(hasattr(module, "base_layer") for module in merged.modules())
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(merged))
    assert again.num_parameters() == factored(*kinds).num_parameters()
    more = adapted(again, target_modules=target)
    trained(more)
    expected = logits(more)
    torch.testing.assert_close(logits(more.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("atoms", [0, 1, 3])
def test_lora_merges_exactly_into_shared_atoms(atoms, tmp_path):
    model = adapted(shared(atoms))
    trained(model)
    found = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, dtype=torch.float32)), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_sixteen_bits(dtype):
    model = adapted(factored("low_rank", "free16", dtype=dtype))
    trained(model)
    found = logits(model)
    scale = found.abs().max()
    merged = model.merge_and_unload()
    assert merged.dtype == dtype and (logits(merged) - found).abs().max() < 0.05 * scale


def test_two_adapters_merge_together():
    model = adapted(factored("free16"))
    trained(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    trained(model)
    model.base_model.set_adapter(["default", "second"])
    found = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), found, rtol=1e-4, atol=1e-4)


def test_unloading_without_merging_gives_the_model_back():
    model = adapted(factored("free16"))
    trained(model)
    assert torch.equal(logits(model.unload()), logits(factored("free16")))


def test_a_refused_merge_leaves_the_dense_layers_before_it_unmerged():
    model = adapted(partly())
    trained(model)
    found, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match=r"layers.2.mlp.down_proj: .*4 bits.*Nothing was merged"):
        model.merge_and_unload()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), found)


def test_dense_layers_beside_compressed_ones_still_merge():
    model = adapted(partly(), target_modules=["q_proj"])
    trained(model)
    found = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), found, rtol=1e-4, atol=1e-4)


def test_without_the_extension_merging_is_refused_too(monkeypatch):
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config._custom_modules = None
    model = adapted(factored("low_rank"), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__.startswith("peft.")
    for safe in (False, True):
        with pytest.raises(ModelError, match="cospadi export"):
            layer.merge(safe_merge=safe)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialisations_that_change_the_weight_are_refused(start):
    with pytest.raises(ModelError, match=r"computed from its stored factors and cannot be changed"):
        adapted(factored(), init_lora_weights=start)


@pytest.mark.parametrize("make", [factored, shared])
def test_preparing_for_training_keeps_the_dtypes(make):
    model = make(dtype=torch.bfloat16)
    before = {name: (p.dtype, p.nbytes) for name, p in model.named_parameters()}
    prepare_model_for_kbit_training(model)
    assert {name: (p.dtype, p.nbytes) for name, p in model.named_parameters()} == before
    assert model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    model = adapted(model)
    assert trained(model, 5)[-1] < 6


def test_a_dense_model_is_prepared_as_ever():
    model = factored(dtype=torch.bfloat16).dequantize()
    prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Texts(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": ids[index % 2], "labels": ids[index % 2]}


@pytest.mark.parametrize("make", [factored, shared])
def test_trainer_with_gradient_checkpointing(make, tmp_path):
    model = adapted(make(dtype=torch.bfloat16))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        gradient_checkpointing=True,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=6,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    again = PeftModel.from_pretrained(make(dtype=torch.bfloat16), tmp_path / "checkpoint-6")
    torch.testing.assert_close(logits(again), logits(model.eval()))
