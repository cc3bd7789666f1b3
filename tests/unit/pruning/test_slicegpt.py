"""SliceGPT against its definition: a dense model whose residual stream is projected before every sublayer."""

import copy

import pytest
import torch

from cospadi.errors import BudgetError, ModelError, NumericalError, RecipeError
from cospadi.layers.sliced import SlicedNorm
from cospadi.model_view import discover_layers
from cospadi.pruning.base import block_bytes, get_pruning_method
from cospadi.pruning.evidence import Evidence, Tokens
from cospadi.pruning.width.residual import norm_of, residual_blocks
from cospadi.pruning.width.slicegpt import Slicing, find_bases, sliced_bytes, sliced_width, width_for
from tiny import tiny_model, token_ids

D, BLOCKS = 24, 3
ids = token_ids(3, 17, seed=5)
SLICEABLE = ["llama", "mistral", "qwen2", "qwen3", "starcoder2", "phi3"]


def small(architecture, **overrides):
    if architecture == "starcoder2":
        overrides = {"intermediate_size": 44, "num_key_value_heads": 2} | overrides
    return tiny_model(architecture, **overrides)


def logits(model, tokens=ids):
    with torch.no_grad():
        return model(tokens).logits


def slice_to(model, width, tokens=ids, lengths=None):
    """A sliced copy and the edit that made it."""
    view = discover_layers(model)
    edit = find_bases(Evidence(view, Tokens(tokens, lengths)), residual_blocks(view), width)
    return edit.apply(discover_layers(copy.deepcopy(model))), edit


def orthogonal(seed, width=D):
    draw = torch.randn(D, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if width < D:  # a stream whose mean LayerNorm takes off has no principal axis along (1, …, 1)
        draw = draw - draw.mean(0)
    return torch.linalg.qr(draw)[0]


def random_slicing(width):
    pairs = tuple((orthogonal(2 * i, width), orthogonal(2 * i + 1, width)) for i in range(BLOCKS))
    return Slicing(width, pairs, {})


def projected(model, bases, note=None):
    """The definition, on the model's own modules: x ← x Q Qᵀ before every sublayer, all in the original basis."""
    model = copy.deepcopy(model)
    centred = hasattr(model.model.layers[0].input_layernorm, "bias")
    for index, block in enumerate(model.model.layers):

        def forward(hidden_states, _block=block, _index=index, **kwargs):
            x = hidden_states - hidden_states.mean(-1, keepdim=True) if centred else hidden_states
            for place, (norm, part) in enumerate(
                ((_block.input_layernorm, _block.self_attn), (_block.post_attention_layernorm, _block.mlp))
            ):
                if note:
                    note(_index, place, x, norm)
                q = bases[_index][place].to(x.dtype)
                x = x @ q @ q.T
                out = part(norm(x), **(kwargs if place == 0 else {}))
                out = out[0] if isinstance(out, tuple) else out
                x = x + (out - out.mean(-1, keepdim=True) if centred else out)
            return x

        block.forward = forward
    return model


@pytest.mark.parametrize("architecture", SLICEABLE)
@pytest.mark.parametrize("tied", [False, True])
def test_slicing_nothing_changes_nothing(architecture, tied):
    model = small(architecture, tie_word_embeddings=tied)
    sliced, edit = slice_to(model, D)
    assert sliced.model.layers[1].mixer_shortcut.weight.shape == (D, D)
    torch.testing.assert_close(logits(sliced), logits(model), rtol=1e-4, atol=1e-4)
    assert max(edit.told["signal_lost"]) < 1e-12
    assert sliced.config.tie_word_embeddings is False
    assert sliced.get_output_embeddings().weight is not sliced.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", SLICEABLE)
def test_rotation_invariance(architecture):
    """Any orthogonal bases, another one before every sublayer, leave the function alone."""
    model = small(architecture, dtype=torch.float64)
    rotated = random_slicing(D).apply(discover_layers(copy.deepcopy(model)))
    weights = [m.model.layers[0].self_attn.o_proj.weight for m in (model, rotated)]
    assert (weights[0] - weights[1]).abs().max() > 0.1
    # LayerNorm and rotary embeddings stay in float32 here and there
    torch.testing.assert_close(logits(rotated), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", SLICEABLE)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_sliced_model_is_the_projected_dense_model(architecture, eps):
    model = small(architecture, **{"norm_epsilon" if architecture == "starcoder2" else "rms_norm_eps": eps})
    slicing = random_slicing(16)
    sliced = slicing.apply(discover_layers(copy.deepcopy(model)))
    expected = logits(projected(model, slicing.bases))
    assert (expected - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(logits(sliced), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "starcoder2"])
def test_bases_are_the_principal_axes_of_the_sliced_model(architecture):
    """Every basis comes from the normalised stream of the model with all earlier sublayers sliced already."""
    model = small(architecture)
    _, edit = slice_to(model, 16)
    found = {}

    def note(index, place, x, norm):
        wide = x.double().flatten(0, 1)
        eps = norm_of(model.model.layers[index], "input_layernorm").eps
        signal = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        found[index, place] = signal

    logits(projected(model, edit.bases, note))
    assert len(found) == 2 * BLOCKS
    for number, ((index, place), signal) in enumerate(found.items()):
        q = edit.bases[index][place]
        energies = torch.linalg.eigvalsh(signal.T @ signal)
        lost = (signal - signal @ q @ q.T).square().sum()
        # the least loss possible is the sum of the eigenvalues that go
        torch.testing.assert_close(lost, energies[: D - 16].sum(), rtol=1e-4, atol=1e-6)
        share = float(energies[: D - 16].sum() / energies.sum())
        assert edit.told["signal_lost"][number] == pytest.approx(share, rel=1e-4)
        assert share > 1e-3


def test_a_stream_of_low_rank_is_sliced_without_loss():
    model = small("llama")
    q = orthogonal(7, 8).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ q @ q.T)
        for block in model.model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.copy_(q @ q.T @ linear.weight)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight.fill_(1.3)
    sliced, _ = slice_to(model, 8)
    assert sliced.get_input_embeddings().weight.shape[1] == 8
    torch.testing.assert_close(logits(sliced), logits(model), rtol=1e-4, atol=1e-4)


def test_padding_does_not_count():
    model = small("llama")
    lengths = torch.tensor([17, 9, 4])
    other = ids.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = 256
    first, second = (slice_to(model, 16, tokens, lengths)[1] for tokens in (ids, other))
    whole = slice_to(model, 16, ids)[1]
    for ours, theirs, all_tokens in zip(first.bases, second.bases, whole.bases, strict=True):
        for q, same, different in zip(ours, theirs, all_tokens, strict=True):
            torch.testing.assert_close(q, same, rtol=0, atol=1e-4)
            assert (q @ q.T - different @ different.T).abs().max() > 1e-2


def test_solving_leaves_the_model_alone_and_repeats():
    model = small("qwen2", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    first, one = slice_to(model, 16)
    second, _ = slice_to(model, 16)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert kinds == [type(module) for module in model.modules()]
    assert all("forward" not in block.__dict__ for block in model.model.layers)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.dtype in (torch.bfloat16, torch.uint8), name
    assert one.facts()["removed"] == []


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "starcoder2", "phi3"])
def test_bytes_are_those_of_the_tensors(architecture):
    model = small(architecture)
    view = discover_layers(model)
    blocks = residual_blocks(view)
    total = sum(map(block_bytes, view.layers))
    for width in (8, 16, 24):
        counted = sliced_bytes(view, blocks, width)
        made = random_slicing(width).apply(discover_layers(copy.deepcopy(model)))
        assert counted == sum(map(block_bytes, made.model.layers))
        keep = counted / total
        if keep < 1:
            assert width_for(view, blocks, keep) == width
            if width > 8:
                assert width_for(view, blocks, keep - 1e-9) == width - 8
    with pytest.raises(BudgetError, match="the least possible is 0"):
        width_for(view, blocks, 0.05)


@pytest.mark.parametrize(
    ("full", "slicing", "width"),
    [(4096, 0.25, 3072), (4096, 0.3, 2864), (512, 0.2, 408), (24, 0.0, 24), (30, 0.0, 30), (30, 0.1, 24)],
)
def test_width_as_published(full, slicing, width):
    assert sliced_width(full, slicing) == width


def test_method_meets_keep_and_takes_the_published_measure():
    model = small("llama")
    evidence = Evidence(discover_layers(model), Tokens(ids))
    method = get_pruning_method("slicegpt")
    total = sum(map(block_bytes, evidence.view.layers))
    edit = method.shrink(evidence, 0.9, {})
    made = edit.apply(discover_layers(copy.deepcopy(model)))
    assert edit.facts()["bytes"] == sum(map(block_bytes, made.model.layers)) <= 0.9 * total
    assert edit.facts()["width"] == 16
    assert method.shrink(evidence, 0.9, {"slicing": 0.5}).facts()["width"] == 8
    with pytest.raises(BudgetError, match=r"slicing 0\.1 leaves"):
        method.shrink(evidence, 0.1, {"slicing": 0.1})
    with pytest.raises(BudgetError, match="leaves nothing"):
        method.shrink(evidence, 0.9, {"slicing": 0.9})
    with pytest.raises(RecipeError, match="slicing"):
        method.shrink(evidence, 0.9, {"slicing": 1.0})
    with pytest.raises(RecipeError, match="did you mean 'slicing'"):
        method.shrink(evidence, 0.9, {"slice": 0.5})


@pytest.mark.parametrize(
    ("architecture", "why", "overrides"),
    [
        ("gemma3_text", "plain nn.Embedding", {}),
        ("gpt_neox", "is not", {}),
        ("opt", "norm, attention, norm, MLP", {}),
        ("olmo2", "x \\+ attention\\(norm\\(x\\)\\)", {}),
        ("granite", "before the first decoder layer", {"embedding_multiplier": 3.0}),
        ("granite", "is not x \\+ attention", {"residual_multiplier": 0.5}),
        ("gpt2", "is not|x \\+|changes the arguments|linear layers", {}),
    ],
)
def test_other_architectures_are_refused(architecture, why, overrides):
    model = tiny_model(architecture, **overrides)
    with pytest.raises(ModelError, match=why) as caught:
        residual_blocks(discover_layers(model))
    assert "choose another" in str(caught.value) and "\n" not in str(caught.value)


def test_something_else_that_reads_the_stream_is_noticed():
    model = small("llama")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * x.mean(-1, keepdim=True))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp uses its input for more"):
        residual_blocks(discover_layers(model))
    mlp.forward = plain
    residual_blocks(discover_layers(model))


def test_norms_are_known_by_what_they_compute():
    block = torch.nn.Module()
    block.layer = torch.nn.LayerNorm(D, eps=0.3)
    torch.nn.init.uniform_(block.layer.weight, 0.5, 1.5)
    torch.nn.init.normal_(block.layer.bias)
    found = norm_of(block, "layer")
    assert found.centred and found.eps == 0.3 and torch.equal(found.shift, block.layer.bias)
    gemma = tiny_model("gemma2").model.layers[0]
    found = norm_of(gemma, "input_layernorm")
    assert not found.centred and torch.equal(found.gain, 1 + gemma.input_layernorm.weight)
    block.odd = torch.nn.GroupNorm(2, D)
    with pytest.raises(ModelError, match="odd"):
        norm_of(block, "odd")


def test_norm_counts_what_was_cut_as_zero():
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x, torch.zeros(5, 8, dtype=torch.float64)], -1)
    expected = torch.nn.functional.rms_norm(wide, (D,), eps=0.1)[:, :16]
    torch.testing.assert_close(SlicedNorm(16, D, 0.1)(x), expected)
    assert SlicedNorm(16, D, 0.1)(x.bfloat16()).dtype == torch.bfloat16


def test_nan_in_the_stream_names_the_layer():
    model = small("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    view = discover_layers(small("llama"))
    blocks = residual_blocks(view)
    with pytest.raises(NumericalError, match=r"model\.layers\.2"):
        find_bases(Evidence(discover_layers(model), Tokens(ids)), blocks, 16)
