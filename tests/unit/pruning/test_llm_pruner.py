"""LLM-Pruner against its definition: importance by brute force, pruning by silencing weights."""

import copy

import pytest
import torch
from torch.nn import functional

from cospadi.errors import BudgetError, CalibrationError, ModelError, NumericalError, RecipeError
from cospadi.model_view import discover
from cospadi.pruning.base import block_bytes, get_pruning_method
from cospadi.pruning.evidence import Evidence, Tokens
from cospadi.pruning.width.llm_pruner import Narrowing, gradients, importance, largest, sizes_for
from cospadi.pruning.width.units import block_units
from tiny import tiny_model, token_ids

ids = token_ids(3, 13, seed=2)
PRUNABLE = ["llama", "mistral", "qwen2", "qwen3", "starcoder2", "gemma3_text"]
TAYLOR = ["vectorize", "param_first", "param_second", "param_mix"]


def small(architecture="llama", **overrides):
    if architecture == "starcoder2":
        overrides = {"intermediate_size": 44, "num_key_value_heads": 2} | overrides
    return tiny_model(architecture, **overrides)


def logits(model, tokens=ids):
    with torch.no_grad():
        return model(tokens).logits


def loss(model, sequence):
    return functional.cross_entropy(model(sequence[None]).logits[0, :-1], sequence[1:])


def evidence_of(model, tokens=ids, lengths=None):
    return Evidence(discover(model), Tokens(tokens, lengths))


def slices(view, block, kind, index):
    """(weight, rows or columns) of everything that belongs to one structure."""
    unit = getattr(block_units(view)[block], kind)
    layer = view.layers[block]
    for name in (*unit.readers, unit.writer):
        linear = layer.get_submodule(name)
        axis = 1 if name == unit.writer else 0
        size = linear.weight.shape[axis] // unit.count
        where = slice(index * size, (index + 1) * size)
        yield linear, ((slice(None), where) if axis else (where,))


@pytest.fixture(scope="module")
def wide():
    """Float64 throughout: transformers' own norms would round to float32."""
    model = small("qwen2", dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            norm = torch.nn.RMSNorm(24, eps=1e-6, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_vectorised_importance_is_the_first_order_change_of_the_loss(wide, kind):
    """|dL/dε| where the structure's weights are scaled by 1 - ε, by central differences."""
    model = copy.deepcopy(wide)
    view = discover(model)
    names = [f"{view.layers_name}.1.{name}" for name in block_units(view)[1].names]
    found = gradients(evidence_of(model), Tokens(ids), names, squared=False)
    structures = getattr(block_units(view)[1], kind)
    scores = importance(view, structures, f"{view.layers_name}.1.", found, "vectorize")
    step = 1e-5
    for index in range(0, structures.count, 5 if kind == "mlp" else 1):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                kept = [(linear, where, linear.weight[where].clone()) for linear, where in slices(view, 1, kind, index)]
                for linear, where, values in kept:
                    linear.weight[where] = values * (1 - sign * step)
                losses.append(torch.stack([loss(model, sequence) for sequence in ids]).mean())
                for linear, where, values in kept:
                    linear.weight[where] = values
        slope = abs(float(losses[0] - losses[1])) / (2 * step)
        assert float(scores[index]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert scores.min() < 0.9 * scores.max()


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("taylor", TAYLOR)
def test_importance_weight_by_weight(wide, kind, taylor):
    view = discover(wide)
    units = block_units(view)
    names = [f"{view.layers_name}.2.{name}" for name in units[2].names]
    found = gradients(evidence_of(wide), Tokens(ids), names, squared=True)
    scores = importance(view, getattr(units[2], kind), f"{view.layers_name}.2.", found, taylor)
    for index in (0, len(scores) - 1):
        total = 0.0
        for linear, where in slices(view, 2, kind, index):
            each = []
            for sequence in ids:
                wide.zero_grad()
                loss(wide, sequence).backward()
                each.append(linear.weight.grad[where].clone())
            w, g = linear.weight.detach()[where], torch.stack(each).mean(0)
            fisher = torch.stack(each).square().mean(0)
            total += {
                "vectorize": (w * g).sum(),
                "param_first": (w * g).abs().sum(),
                "param_second": (w * w * fisher).sum(),
                "param_mix": (w * g - 0.5 * w * w * fisher).abs().sum(),
            }[taylor]
        assert float(scores[index]) == pytest.approx(abs(float(total)), rel=1e-9)
    wide.zero_grad(set_to_none=True)


@pytest.mark.parametrize("architecture", PRUNABLE)
def test_pruned_model_is_the_dense_model_with_those_weights_at_zero(architecture):
    model = small(architecture)
    view = discover(model)
    units = block_units(view)
    heads = [(0, 1), (1,), (0,)]
    channels = [(0, 3, 4, 20, 43), tuple(range(44)), (1, 2)]
    assert units[0].attention.count == 2 and units[0].mlp.count == 44
    silent = copy.deepcopy(model)
    for block in range(3):
        for kind, kept in (("attention", heads[block]), ("mlp", channels[block])):
            for index in set(range(getattr(units[block], kind).count)) - set(kept):
                for linear, where in slices(discover(silent), block, kind, index):
                    with torch.no_grad():
                        linear.weight[where] = 0
                        if linear.bias is not None and len(where) == 1:
                            linear.bias[where] = 0
    pruned = Narrowing(tuple(heads), tuple(channels), {}).apply(discover(copy.deepcopy(model)))
    assert pruned.model.layers[1].self_attn.q_proj.weight.shape == (12, 24)
    assert (logits(silent) - logits(model)).abs().max() > 0.1
    expected = logits(silent)
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "starcoder2", "gemma3_text"])
def test_equal_cuts_are_a_stock_model(architecture):
    model = small(architecture)
    method = get_pruning_method("llm_pruner")
    edit = method.shrink(evidence_of(model), 0.45, {"leave_first": 0, "leave_last": 0})
    pruned = edit.apply(discover(copy.deepcopy(model)))
    config = pruned.config
    assert not hasattr(config, "quantization_config")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 6)
    assert config.intermediate_size == len(edit.channels[0]) < 44
    again = type(model)(config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}
    again.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(logits(again.eval()), logits(pruned), rtol=1e-6, atol=1e-6)


def test_blocks_are_left_alone_as_published():
    model = small(num_hidden_layers=16)
    edit = get_pruning_method("llm_pruner").shrink(evidence_of(model), 0.58, {"sequences": 1})
    told = edit.facts()
    assert told["head_groups"] == [2, 2] + [1] * 13 + [2]
    assert told["channels"][:2] == [44, 44] and told["channels"][-1] == 44 and len(set(told["channels"][2:15])) == 1
    pruned = edit.apply(discover(copy.deepcopy(model)))
    assert pruned.config.quantization_config.quant_method == "cospadi_width"
    assert pruned.config.num_attention_heads == 4 and pruned.config.intermediate_size == 44


def test_the_least_important_go():
    scores = torch.tensor([3.0, 1.0, 2.0, 3.0, 0.5])
    assert largest(scores, 3) == (0, 2, 3)
    assert largest(torch.ones(4), 2) == (0, 1)
    model = small()
    view = discover(model)
    with torch.no_grad():  # these contribute nothing, so their importance is zero
        view.layers[1].self_attn.o_proj.weight[:, :12] = 0
        view.layers[1].self_attn.q_proj.weight[:12] = 0
        view.layers[1].self_attn.k_proj.weight[:6] = 0
        view.layers[1].self_attn.v_proj.weight[:6] = 0
        view.layers[1].mlp.down_proj.weight[:, 5:15] = 0
        view.layers[1].mlp.gate_proj.weight[5:15] = 0
        view.layers[1].mlp.up_proj.weight[5:15] = 0
    for taylor in TAYLOR:
        edit = get_pruning_method("llm_pruner").shrink(
            evidence_of(model), 0.8, {"taylor": taylor, "leave_first": 1, "leave_last": 1}
        )
        assert edit.heads[1] == (1,)
        assert edit.heads[0] == edit.heads[2] == (0, 1)
        gone = set(range(44)) - set(edit.channels[1])
        assert len(gone) > 10 and gone >= set(range(5, 15))


@pytest.mark.parametrize("architecture", ["llama", "starcoder2"])
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.55, 0.5])
def test_sizes_fill_the_budget_and_never_exceed_it(architecture, keep):
    model = small(architecture)
    view = discover(model)
    units = block_units(view)
    total = sum(map(block_bytes, view.layers))
    for pruned in (range(3), range(1, 3)):
        sizes = sizes_for(view, units, pruned, keep)
        heads = tuple(tuple(range(sizes.get(i, (2, 44))[0])) for i in range(3))
        channels = tuple(tuple(range(sizes.get(i, (2, 44))[1])) for i in range(3))
        cut = Narrowing(heads, channels, {}).apply(discover(copy.deepcopy(model)))
        bytes_left = sum(map(block_bytes, cut.model.layers))
        assert bytes_left <= keep * total
        channel = units[0].mlp.bytes_each(view.layers[0])
        assert bytes_left + len(pruned) * channel > keep * total
        assert len(set(sizes.values())) == 1


def test_few_large_groups_of_heads_are_kept_longest():
    """Half of the attention does not go because four tenths should."""
    view = discover(small())
    for keep, heads in ((0.9, 2), (0.6, 2), (0.51, 2), (0.5, 1), (0.4, 1)):
        sizes = sizes_for(view, block_units(view), range(3), keep)
        assert {groups for groups, _ in sizes.values()} == {heads}


def test_bytes_told_are_those_of_the_tensors_and_scores_are_shared():
    model = small()
    evidence = evidence_of(model)
    seen = []
    evidence.progress = lambda *event: seen.append(event)
    method = get_pruning_method("llm_pruner")
    for keep in (0.8, 0.6):
        edit = method.shrink(evidence, keep, {})
        cut = edit.apply(discover(copy.deepcopy(model)))
        assert edit.facts()["bytes"] == sum(map(block_bytes, cut.model.layers))
        assert edit.facts()["sequences"] == 3
    assert len(seen) == 3  # gradients of three sequences, once


def test_gradients_leave_the_model_alone_and_ignore_padding():
    model = small(dtype=torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    lengths = torch.tensor([13, 5, 2])
    other = ids.clone()
    other[1, 5:], other[2, 2:] = 7, 9
    name = "model.layers.0.mlp.up_proj"
    found = [
        gradients(evidence_of(model), Tokens(tokens, lengths), [name], squared=False).first[name]
        for tokens in (ids, other)
    ]
    assert torch.equal(*found) and found[0].dtype == torch.float32 and bool(found[0].any())
    whole = gradients(evidence_of(model), Tokens(ids), [name], squared=False).first[name]
    assert not torch.allclose(found[0], whole)
    assert all(torch.equal(before[n], p) and p.dtype == torch.bfloat16 for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.norm.weight.requires_grad and model.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("architecture", ["phi3", "gpt_neox"])
def test_fused_projections_are_refused(architecture):
    with pytest.raises(ModelError, match="separate queries, keys and values"):
        block_units(discover(tiny_model(architecture)))


def test_heads_that_are_not_independent_are_noticed():
    norms_over_all_heads = tiny_model("olmo2", num_key_value_heads=2, intermediate_size=44)
    edit = Narrowing(((0,),) * 3, (tuple(range(44)),) * 3, {})
    with pytest.raises(ModelError, match="are not independent"):
        edit.apply(discover(norms_over_all_heads))
    model = small()
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + args[0].mean(-1, keepdim=True),))
    with pytest.raises(ModelError, match="does not compute what the original computes"):
        edit.apply(discover(model))


def test_bad_sizes_options_and_texts():
    method = get_pruning_method("llm_pruner")
    evidence = evidence_of(small())
    with pytest.raises(BudgetError, match=r"the least possible is 0\.\d+; lower leave_first"):
        method.shrink(evidence, 0.1, {})
    with pytest.raises(BudgetError, match="leaves none to prune"):
        method.shrink(evidence, 0.8, {"leave_first": 2, "leave_last": 1})
    with pytest.raises(RecipeError, match="taylor"):
        method.shrink(evidence, 0.8, {"taylor": "third"})
    with pytest.raises(RecipeError, match="sequences"):
        method.shrink(evidence, 0.8, {"sequences": 0})
    with pytest.raises(CalibrationError, match="nothing to predict"):
        method.shrink(evidence_of(small(), ids[:, :1]), 0.8, {})
    broken = small()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(NumericalError, match=r"layers\.\d\.\S+: NaN or Inf"):
        method.shrink(evidence_of(broken), 0.8, {})
