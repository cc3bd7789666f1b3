import copy
import warnings

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cospadi.errors import BudgetError, ModelError, RecipeError
from cospadi.model_view import discover_layers
from cospadi.pruning import Evidence, Tokens, all_pruning_methods, block_bytes, get_pruning_method
from cospadi.pruning.base import fewest_blocks
from cospadi.pruning.depth.laco import merged_weights
from cospadi.pruning.depth.surgery import Cut
from tiny import token_ids
from unit.pruning.models import HYBRID, STANDARD, deep_model, generated, logits, skipping

DEPTH = sorted(name for name, method in all_pruning_methods().items() if method.unit == "blocks")


def evidence(model, *, seed=0, sequences=6, length=20, lengths=None):
    return Evidence(discover_layers(model), Tokens(token_ids(sequences, length, seed=9), lengths), seed=seed)


def remove(found, name, blocks, **options):
    return get_pruning_method(name).remove(found, blocks, options)


def pruned(model, cut):
    return cut.apply(discover_layers(copy.deepcopy(model)))


def test_the_family_is_there():
    assert set(DEPTH) == {"replaceme", "uidl", "shortgpt", "sleb", "laco", "llm_streamline", "magnitude", "random"}


@pytest.mark.parametrize("architecture", STANDARD)
def test_every_method_prunes_every_architecture(architecture):
    model = deep_model(architecture)
    found = evidence(model)
    for name in DEPTH:
        options = {"separate": True, "ridge": 0.1} if name == "replaceme" and architecture.startswith("gemma") else {}
        for blocks in (1, 2, 3):
            cut = remove(found, name, blocks, **options)
            assert len(cut.removed) == blocks == len(cut.facts()["removed"])
        out = logits(pruned(model, cut), found.tokens.ids)
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("architecture", HYBRID)
@pytest.mark.parametrize("name", DEPTH)
def test_hybrid_models_are_pruned_as_if_the_blocks_were_skipped_or_refused(architecture, name, tmp_path):
    model = deep_model(architecture)
    found = evidence(model)
    if name == "laco":
        with pytest.raises(ModelError, match="block 2 has other shapes"):
            remove(found, name, 1)
        return
    cut = remove(found, name, 1)
    made = pruned(model, cut)
    if not cut.weights:
        expected = skipping(model, found.view.layers, cut.removed, found.tokens.ids)
        assert torch.equal(logits(made, found.tokens.ids), expected)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, found.tokens.ids), logits(made, found.tokens.ids))
    assert torch.equal(generated(loaded, found.tokens.ids, True), generated(loaded, found.tokens.ids, False))


@pytest.mark.parametrize(("name", "measure"), [("uidl", "angular"), ("llm_streamline", "cosine")])
def test_runs_go_where_the_distance_is_least(name, measure):
    found = evidence(deep_model("qwen3", blocks=7))
    distances = getattr(found.pairs, measure)
    for blocks in (1, 2, 4):
        prices = [float(distances[a, a + blocks]) for a in range(8 - blocks)]
        cut = remove(found, name, blocks)
        assert prices[cut.removed[0]] == min(prices)
        assert cut.removed == tuple(range(cut.removed[0], cut.removed[0] + blocks))
        assert cut.facts()["distance"] == min(prices)
        assert not cut.weights
    assert remove(found, name, 2, start=3).removed == (3, 4)
    with pytest.raises(RecipeError, match="start=6"):
        remove(found, name, 2, start=6)


def test_uidl_looks_at_the_last_token_and_llm_streamline_at_all():
    model = deep_model("llama", blocks=7)
    ids = token_ids(6, 20, seed=9)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]  # the last one is normed
    found = evidence(model)
    for a in range(6):
        for b in range(a + 1, 7):
            cos = functional.cosine_similarity(hidden[a].double(), hidden[b].double(), dim=-1)
            assert float(found.pairs.cosine[a, b]) == pytest.approx(float(1 - cos.mean()), abs=1e-6)
            assert float(found.pairs.angular[a, b]) == pytest.approx(
                float((torch.acos(cos[:, -1]) / torch.pi).mean()), abs=1e-4
            )


def test_shortgpt_removes_the_blocks_of_least_influence():
    found = evidence(deep_model("mistral", blocks=7))
    influence = [float(found.pairs.cosine[i, i + 1]) for i in range(7)]
    order = sorted(range(7), key=influence.__getitem__)
    for blocks in (1, 3, 6):
        cut = remove(found, "shortgpt", blocks)
        assert set(cut.removed) == set(order[:blocks])
        assert cut.facts()["scores"] == pytest.approx(influence)


def loss(model, ids, lengths):
    out = logits(model, ids)
    total, count = 0.0, 0
    for row, length in enumerate(lengths):
        total += float(functional.cross_entropy(out[row, : length - 1], ids[row, 1:length], reduction="sum"))
        count += length - 1
    return total / count


@pytest.mark.parametrize("padded", [False, True])
def test_sleb_is_greedy_on_the_loss_of_the_model_as_it_is_then(padded):
    model = deep_model("qwen2", blocks=6)
    lengths = torch.tensor([20, 5, 13, 20, 2, 9]) if padded else None
    found = evidence(model, lengths=lengths)
    gone, losses = [], []
    for _ in range(3):
        candidates = {
            index: loss(
                pruned(model, Cut((*gone, index))),
                found.tokens.ids,
                [20] * 6 if lengths is None else lengths.tolist(),
            )
            for index in range(1, 5)
            if index not in gone
        }
        gone.append(min(candidates, key=candidates.__getitem__))
        losses.append(candidates[gone[-1]])
    for blocks in (3, 1):  # a smaller cut after a larger one comes from what is known
        told = remove(found, "sleb", blocks).facts()
        assert told["order"] == gone[:blocks]
        assert told["losses"] == pytest.approx(losses[:blocks], abs=1e-5)
    with pytest.raises(BudgetError, match="first 1 and the last 1"):
        remove(found, "sleb", 5)
    assert set(remove(found, "sleb", 5, first=0).removed) == {0, 1, 2, 3, 4}


def test_laco_adds_the_differences_of_the_collapsed_blocks():
    model = deep_model("qwen2", blocks=6)
    view = discover_layers(model)
    weights = merged_weights(view, ((1, 4),))
    for name, own in view.layers[1].named_parameters():
        others = [dict(view.layers[i].named_parameters())[name] for i in (2, 3)]
        expected = own + sum(other - own for other in others)
        torch.testing.assert_close(weights[f"model.layers.1.{name}"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert len(weights) == len(list(view.layers[1].named_parameters()))


def test_laco_reports_the_similarity_of_the_model_it_gives():
    model = deep_model("llama", blocks=7)
    found = evidence(model, lengths=torch.tensor([20, 5, 13, 20, 2, 9]))
    for blocks in (1, 2, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random blocks: little is left of the model
            cut = remove(found, "laco", blocks)
        told = cut.facts()
        assert len(cut.removed) == blocks and 0 not in cut.removed and 1 not in cut.removed
        final = []
        for each in (model, pruned(model, cut)):
            view = discover_layers(each)
            seen = []
            handle = view.layers[-1].register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            logits(each, found.tokens.ids)
            handle.remove()
            final.append(seen[0][torch.arange(6), found.tokens.lengths - 1])
        similarity = float(functional.cosine_similarity(*final, dim=-1).mean())
        assert told["similarity"] == pytest.approx(similarity, abs=1e-5)
        assert told["similarity"] > told["threshold"]
    with pytest.raises(BudgetError, match="laco cannot remove 6"):
        remove(found, "laco", 6)


def silent_blocks(silent, blocks=9):
    """A model some of whose blocks add nothing to the residual stream."""
    model = deep_model("llama", blocks=blocks)
    with torch.no_grad():
        for index in silent:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model


def test_laco_searches_the_size_of_a_collapse():
    # A collapse of two blocks leaves the second, so dropping two silent blocks changes nothing. One collapse of three
    # blocks, all that the published size of 4 leaves room for, always loses a block that matters.
    found = evidence(silent_blocks((2, 6)))
    told = remove(found, "laco", 2).facts()
    assert told["collapsed"] == [[2, 3], [6, 7]] and told["merge"] == 2
    assert told["similarity"] == pytest.approx(1.0, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for merge in (2, 3, 4):
            fixed = remove(found, "laco", 2, merge=merge).facts()
            assert fixed["merge"] == merge and fixed["similarity"] <= told["similarity"]
    assert fixed["similarity"] < 0.9 and len(fixed["collapsed"]) == 1


def test_laco_warns_where_little_of_the_model_is_left():
    found = evidence(silent_blocks((2, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert remove(found, "laco", 2).facts()["similarity"] > 0.45
    found = evidence(deep_model("llama", blocks=9))
    with pytest.warns(UserWarning, match="leave out merge, remove fewer blocks or use another method") as caught:
        told = remove(found, "laco", 5, merge=6).facts()
    assert told["similarity"] < 0.45 and f"only {told['similarity']:.2f}" in str(caught[0].message)


def test_laco_never_collapses_a_block_twice():
    found = evidence(silent_blocks((1, 2, 3, 4, 5, 6, 7)))
    for blocks in (2, 3, 4):
        collapsed = remove(found, "laco", blocks, merge=3, interval=1).facts()["collapsed"]
        members = [index for run in collapsed for index in run]
        assert len({*members}) == len(members) and sum(len(run) - 1 for run in collapsed) == blocks


def test_laco_needs_blocks_of_one_shape():
    model = deep_model("llama")
    model.model.layers[3].mlp = deep_model("llama", intermediate_size=20).model.layers[3].mlp
    with pytest.raises(ModelError, match="block 3"):
        remove(evidence(model), "laco", 1)


def test_the_controls():
    model = deep_model("llama", blocks=6)
    with torch.no_grad():
        for parameter in model.model.layers[4].parameters():
            parameter.mul_(0.1)
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    assert remove(evidence(model), "magnitude", 1).removed == (4,)
    assert remove(evidence(model), "magnitude", 2).removed == (1, 4)
    drawn = {remove(evidence(model, seed=seed), "random", 2).removed for seed in range(12)}
    assert len(drawn) > 4
    for seed in range(4):
        small, large = (set(remove(evidence(model, seed=seed), "random", n).removed) for n in (2, 4))
        assert small < large


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize("blocks", [0, 5, 9])
def test_more_blocks_than_can_go_are_refused(name, blocks):
    with pytest.raises(BudgetError, match=f"cannot remove {blocks} of 5"):
        remove(evidence(deep_model()), name, blocks)


@pytest.mark.parametrize(
    ("name", "blocks", "options"),
    [
        ("replaceme", 5, {}),
        ("replaceme", 2, {"start": 4}),
        ("replaceme", 2, {"fold": "down", "separate": True}),
        ("replaceme", 2, {"transforms": 2, "start": 1}),
        ("uidl", 2, {"start": 4}),
        ("llm_streamline", 2, {"start": -1}),
        ("sleb", 4, {}),
    ],
)
def test_what_cannot_be_is_refused_before_any_text_is_run(name, blocks, options):
    def progress(*_):
        raise AssertionError("text was run")

    found = evidence(deep_model())
    found.progress = progress
    with pytest.raises((BudgetError, RecipeError)):
        remove(found, name, blocks, **options)


def test_unknown_methods_and_options_name_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'replaceme'"):
        get_pruning_method("replace_me")
    with pytest.raises(RecipeError, match="did you mean 'start'"):
        remove(evidence(deep_model()), "uidl", 1, strat=1)
    with pytest.raises(RecipeError, match="takes none"):
        remove(evidence(deep_model()), "shortgpt", 1, start=1)


def test_a_share_removes_the_fewest_blocks_that_meet_it():
    found = evidence(deep_model(blocks=6))
    uidl = get_pruning_method("uidl")
    for keep, blocks in ((0.99, 1), (5 / 6, 1), (0.83, 2), (0.5, 3), (0.49, 4), (1 / 6, 5)):
        assert len(uidl.shrink(found, keep, {}).facts()["removed"]) == blocks
    with pytest.raises(BudgetError, match=r"keep 0\.1667"):
        uidl.shrink(found, 0.16, {})
    for keep in (0.0, 1.0, -1):
        with pytest.raises(BudgetError, match="between 0 and 1"):
            uidl.shrink(found, keep, {})
    # a linear block takes bytes too: one more ordinary block has to go for it
    size = block_bytes(found.view.layers[0])
    keep = (5 * size + 100) / (6 * size)
    separate = get_pruning_method("replaceme").shrink(found, keep, {"separate": True, "ridge": 0.1})
    assert len(separate.facts()["removed"]) == 2 and separate.facts()["added_bytes"] == 2 * 24 * 24


def test_the_fewest_blocks_whatever_their_sizes():
    assert fewest_blocks([10, 10, 10, 10], 40) == 1
    assert fewest_blocks([10, 10, 10, 10], 29.9) == 2
    assert fewest_blocks([5, 30, 5], 10) == 1
    assert fewest_blocks([5, 30, 5], 9) == 2


def test_bytes_of_blocks_are_those_of_their_matrices_at_sixteen_bits():
    for dtype in (torch.float32, torch.bfloat16):
        layer = deep_model("llama", dtype=dtype).model.layers[0]
        assert block_bytes(layer) == 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 44)
