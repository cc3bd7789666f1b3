"""In training the weights of all layers are composed in one product: the same losses and gradients as one by one."""

from contextlib import nullcontext

import pytest
import torch

from cospadi.masa import MasaConfig, MasaForCausalLM, MasaViTConfig, MasaViTForImageClassification
from cospadi.masa.models import attention as attention_module
from cospadi.masa.models import modeling, vision
from tiny import token_ids

SIZES = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 6, "num_attention_heads": 4}
SIZES |= {"initializer_range": 0.2}  # so large that a wrong weight changes the loss visibly
DESIGNS = {
    "dense": {"attention_sharing": "dense"},
    "low_rank": {"attention_sharing": "low_rank"},
    "sequential": {"attention_sharing": "sequential"},
    "repeat": {"attention_sharing": "repeat"},
    "masa_qkvo": {},
    "masa_qkv": {"shared_types": ["q", "k", "v"]},
    "masa_as_many_atoms_as_layers": {"num_atoms": 6},
    "masa_folded": {"folded": True},
}
OF_LANGUAGE = DESIGNS | {
    "gqa": {"attention_sharing": "gqa", "num_key_value_heads": 2},
    "masa_gqa_biases": {"num_key_value_heads": 2, "attention_bias": True},
}
ids = token_ids(2, 12)


def language_model(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    return MasaForCausalLM(MasaConfig(vocab_size=257, **SIZES, **fields)).to(dtype).train()


def classifier(**fields):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return MasaViTForImageClassification(MasaViTConfig(**SIZES, **sizes, **fields)).double().train()


def losses_and_gradients(model, **inputs):
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def one_by_one(monkeypatch, module):
    monkeypatch.setattr(module, "composed_together", lambda *_: nullcontext())


def assert_same(found, wanted, **tolerance):
    torch.testing.assert_close(found[0], wanted[0], **tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def products(monkeypatch):
    """The number of compositions so far."""
    counted = []
    original = attention_module.compose

    def compose(coefficients, atoms):
        counted.append(coefficients.ndim)
        return original(coefficients, atoms)

    monkeypatch.setattr(attention_module, "compose", compose)
    return counted


@pytest.mark.parametrize("fields", OF_LANGUAGE.values(), ids=OF_LANGUAGE)
def test_language_models_of_every_design(fields, monkeypatch):
    found = losses_and_gradients(language_model(**fields), input_ids=ids, labels=ids)
    one_by_one(monkeypatch, modeling)
    assert_same(found, losses_and_gradients(language_model(**fields), input_ids=ids, labels=ids))


@pytest.mark.parametrize("fields", DESIGNS.values(), ids=DESIGNS)
def test_classifiers_of_every_design(fields, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator).double(), "labels": torch.tensor([1, 2, 3])}
    found = losses_and_gradients(classifier(**fields), **inputs)
    one_by_one(monkeypatch, vision)
    assert_same(found, losses_and_gradients(classifier(**fields), **inputs))


@pytest.mark.parametrize("fields", [{}, {"attention_sharing": "repeat"}], ids=["masa", "repeat"])
def test_under_autocast_weights_are_rounded_once(fields, monkeypatch):
    model = language_model(torch.float32, **fields)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for matrices in model.model.shared_attention.values():
            for layer, weight in enumerate(matrices.weights()):
                assert weight.dtype == torch.bfloat16
                # the sum of both ways differs in the last bits of float32, seldom enough to round to the other side
                torch.testing.assert_close(weight, matrices(layer).bfloat16(), rtol=2**-7, atol=1e-6)
        found = losses_and_gradients(model, input_ids=ids, labels=ids)
        one_by_one(monkeypatch, modeling)
        wanted = losses_and_gradients(language_model(torch.float32, **fields), input_ids=ids, labels=ids)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=0)
    for name, gradient in wanted[1].items():
        assert found[1][name].dtype == torch.float32
        assert torch.cosine_similarity(found[1][name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_float64_stays_float64_under_autocast():
    model = language_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.model.shared_attention["q"].weights()[0].dtype == torch.float64


def test_one_product_a_type_in_training_and_one_a_layer_in_evaluation(products):
    model = language_model()
    model(ids)
    assert products == [2] * 4  # tables (L, S) of q, k, v and o
    products.clear()
    model.eval()
    model(ids)
    assert products == [1] * 24
    model.compose()
    products.clear()
    model(ids)
    assert not products


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_composes_layer_by_layer(products, reentrant):
    model = language_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = losses_and_gradients(model, input_ids=ids, labels=ids)
    assert products == [1] * 48  # twice: layers run again in the backward pass
    assert_same(found, losses_and_gradients(language_model(), input_ids=ids, labels=ids))
    model.gradient_checkpointing_disable()
    products.clear()
    model(ids)
    assert products == [2] * 4


def test_nothing_is_held_after_the_forward_pass(monkeypatch):
    model = language_model()
    shared = model.model.shared_attention.values()
    model(ids, labels=ids).loss.backward()
    assert all(matrices.stacked is None for matrices in shared)
    before = model(ids).logits
    with torch.no_grad():
        model.model.shared_attention["v"].atoms.mul_(2)
    assert not torch.allclose(model(ids).logits, before)  # composed anew

    def fails(*_, **__):
        assert all(matrices.stacked is not None for matrices in shared)
        raise RuntimeError("stop")

    monkeypatch.setattr(model.model.layers[3], "forward", fails)
    with pytest.raises(RuntimeError, match="stop"):
        model(ids)
    assert all(matrices.stacked is None for matrices in shared)


def test_losses_of_several_passes_add_up():
    twice, once = language_model(), language_model()
    for row in ids:
        twice(row[None], labels=row[None]).loss.div(2).backward()
    once(ids, labels=ids).loss.backward()
    for (name, one), other in zip(once.named_parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_compiles_to_one_graph():
    plain, model = (language_model(torch.float32) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = losses_and_gradients(compiled, input_ids=ids, labels=ids)
    wanted = losses_and_gradients(plain, input_ids=ids, labels=ids)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in found[1].items()}
    assert_same((found[0], gradients), wanted)
