"""Groups across decoder layers, and what methods get of each of their inputs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cospadi import checkpoint
from cospadi.calibration import StatisticsStore, collect, fisher, read_texts, token_blocks
from cospadi.engine.allocate.rules import final_plan
from cospadi.engine.compress import compress
from cospadi.engine.factorise import factorise_group
from cospadi.engine.plan.grouping import arranged
from cospadi.engine.plan.plan import make_plan
from cospadi.errors import RecipeError
from cospadi.format import GroupSpec
from cospadi.methods import METHODS, Problem, get_method, method
from cospadi.methods.sizing import low_rank_plan
from cospadi.model_view import LinearGroup, discover, open_model
from cospadi.recipe import Recipe
from runs import journal_in, run_context
from tiny import VOCABULARY, save_tiny, tiny_model, tiny_text, token_ids

CPU = torch.device("cpu")
PREFIX = "model.layers"
CALIBRATION = {"samples": 6, "seq_len": 40}


def names(groups):
    return ["+".join(name.removeprefix(f"{PREFIX}.") for name in group.shape.modules) for group in groups]


def test_neighbours_share_what_siblings_read_and_the_rest_stays_alone():
    groups = discover(tiny_model("llama")).groups
    found = arranged(groups, groups, "cross_layer", PREFIX)
    pairs = [
        f"0.{name}+1.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    assert names(found) == [
        *pairs[:3],
        "0.self_attn.o_proj",
        *pairs[3:],
        "0.mlp.down_proj",
        "1.self_attn.o_proj",
        "1.mlp.down_proj",
        *(f"2.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")),
        *(f"2.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ]
    for item in found:
        if len(item.shape.modules) > 1:
            assert [source.layer for source in item.sources] == [0, 1]
            assert all(n in s.modules for n, s in zip(item.shape.modules, item.sources, strict=True))
        else:
            assert len(item.sources) == 1 and item.shape.modules[0] in item.sources[0].modules


def test_all_projections_are_grouped_where_none_has_siblings():
    groups = [LinearGroup((f"h.{layer}.{name}",), layer, 8, (6,)) for layer in (0, 1) for name in ("a", "b")]
    found = arranged(groups, groups, "cross_layer", "h")
    assert [item.shape.modules for item in found] == [("h.0.a", "h.1.a"), ("h.0.b", "h.1.b")]


def test_what_neighbours_lack_stays_alone():
    groups = [
        LinearGroup(("h.0.a", "h.0.b"), 0, 8, (6, 4)),
        LinearGroup(("h.1.a", "h.1.c"), 1, 8, (5, 4)),
    ]
    found = arranged(groups, groups, "cross_layer", "h")
    assert [(item.shape.modules, item.shape.d_out) for item in found] == [
        (("h.0.a", "h.1.a"), (6, 5)),
        (("h.0.b",), (4,)),
        (("h.1.c",), (4,)),
    ]


def test_inputs_of_different_sizes_cannot_share_a_dictionary():
    groups = [LinearGroup((f"h.{n}.a", f"h.{n}.b"), n, width, (6, 4)) for n, width in ((0, 8), (1, 12))]
    with pytest.raises(RecipeError, match=r"h\.0\.a and h\.1\.a cannot share a dictionary: they read 8 and 12 inputs"):
        arranged(groups, groups, "cross_layer", "h")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "m", "llama")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("basis_sharing", {}),
        ("geopair", {"rounds": 3}),
        ("cospadi", {"rounds": 2}),
        ("pursuit", {"rounds": 3}),
    ],
)
def test_a_group_across_layers_is_solved_with_the_gram_of_each(source, tmp_path, method, options):
    grouping = {} if get_method(method).grouping == "cross_layer" else {"grouping": "cross_layer"}
    result = compress(
        source, tmp_path / "out", keep=0.7, method=method, options=options, calibration=[tiny_text(900)],
        recipe=Recipe(calibration=CALIBRATION), device="cpu", **grouping,
    )  # fmt: skip
    report = result.report
    assert report["keep_actual"] <= 0.7
    shared = [row for row in report["groups"] if len(row["modules"]) == 2]
    assert len(shared) == 5
    # the same from the very pieces that the engine should have used
    model, tokenizer = open_model(source)
    view = discover(model)
    loaded = checkpoint.load(tmp_path / "out")
    ids = _tokens(report, tokenizer)
    store = StatisticsStore(tmp_path / "s", {"run": 1})
    collect(view, ids, store=store)
    plan = make_plan(view, Recipe(keep=0.7, method=method, options=options, **grouping))
    assert [g.spec.bytes for g in plan.groups] == [row["bytes"] for row in report["groups"]]
    group = next(g for g in plan.groups if not g.own_input)
    grams = [store.load(s).mean_gram for s in group.sources]
    assert not torch.allclose(grams[0], grams[1])
    missed = energy = 0.0
    for name, gram in zip(group.spec.modules, grams, strict=True):
        weight = view.weight(name).double()
        miss = weight - loaded.get_submodule(name).dense_weight(torch.float64).T
        missed += float((miss * (gram @ miss)).sum())
        energy += float((weight * (gram @ weight)).sum())
    row = next(row for row in report["groups"] if row["modules"] == list(group.spec.modules))
    assert row["error"] == pytest.approx(missed / energy, rel=0.02)
    with torch.no_grad():
        assert loaded(token_ids(1, 9)).logits.isfinite().all()


def _tokens(report, tokenizer):
    return token_blocks(read_texts([tiny_text(900)]), tokenizer, **CALIBRATION, seed=report["seed"]).ids


def test_each_module_is_solved_under_its_own_gram(tmp_path):
    view = discover(tiny_model("llama", seed=2))
    tokens = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    store = StatisticsStore(tmp_path / "s", {"run": 7})
    collect(view, tokens, store=store)
    plan = make_plan(view, Recipe(method="basis_sharing", keep=0.6))
    group = next(g for g in plan.groups if not g.own_input)
    weights = {name: view.weight(name).float() for name in group.spec.modules}
    context, seen = run_context(view, store, tokens, fisher=weights), []

    def spy(problem, spec):
        seen.append(problem)
        return get_method("basis_sharing").factorise(problem, spec, {})

    with METHODS.temporary():
        method("spy", plan=low_rank_plan)(spy)
        packed, info = factorise_group(context, replace(group, spec=group.spec.solved_by("spy")))
    statistics = [store.load(source) for source in group.sources]
    assert [torch.equal(a, b.mean_gram) for a, b in zip(seen[0].grams, statistics, strict=True)] == [True, True]
    assert len(seen[0].mean_abs) == len(seen[0].fisher) == 2
    missed = energy = 0.0
    for weight, part, item in zip(weights.values(), group.spec.rebuild(packed), statistics, strict=True):
        miss = weight.double() - part
        missed += float(torch.trace(miss.T @ item.mean_gram @ miss))
        energy += float(torch.trace(weight.double().T @ item.mean_gram @ weight.double()))
    assert info["missed"] == pytest.approx(missed, rel=1e-9)
    assert info["error"] == pytest.approx(missed / energy, rel=1e-9)


def test_groups_across_layers_keep_their_share_when_others_are_allocated(tmp_path):
    view = discover(tiny_model("llama", seed=2))
    tokens = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    store = StatisticsStore(tmp_path / "s", {"run": 3})
    collect(view, tokens, store=store)
    recipe = Recipe(method="pursuit", keep=0.6, grouping="cross_layer", allocation="knapsack", options={"rounds": 2})
    start = make_plan(view, recipe)
    context, journal = run_context(view, store, tokens), journal_in(tmp_path / "j")
    plan = final_plan(context, recipe, start, journal)
    assert plan.bytes_after <= 0.6 * plan.bytes_before
    assert [g for g in plan.groups if not g.own_input] == [g for g in start.groups if not g.own_input]
    assert [g.spec for g in plan.groups if g.own_input] != [g.spec for g in start.groups if g.own_input]
    assert final_plan(context, recipe, start, journal) == plan  # as read from the journal


def test_layer_by_layer_work_refuses_groups_across_layers(source, tmp_path):
    with pytest.raises(RecipeError, match="spans several"):
        compress(source, tmp_path / "o", keep=0.7, method="basis_sharing", anchor=True, calibration=[tiny_text(900)])


@pytest.mark.parametrize("settings", [{}, {"anchor": True}, {"allocation": "knapsack"}])
def test_fisher_information_is_collected_for_methods_that_need_it(source, tmp_path, monkeypatch, settings):
    seen: list[Problem] = []
    method = get_method("fwsvd")
    own = type(method).factorise

    def spy(self, problem: Problem, spec: GroupSpec, options):
        if self.name == "fwsvd":
            seen.append(problem)
        return own(self, problem, spec, options)

    monkeypatch.setattr(type(method), "factorise", spy)
    recipe = Recipe(calibration=CALIBRATION)
    result = compress(
        source, tmp_path / "out", keep=0.5, method="fwsvd", calibration=[tiny_text(900)], recipe=recipe,
        device="cpu", **settings,
    )  # fmt: skip
    model, tokenizer = open_model(source)
    expected = fisher(discover(model), _tokens(result.report, tokenizer))
    assert {problem.name for problem in seen} == set(expected)
    for problem in seen:
        assert torch.allclose(problem.fisher[0], expected[problem.name], rtol=1e-4, atol=1e-12)
        assert float(problem.fisher[0].max()) > 0


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """A model in which two weights of different layers are all but the same, with statistics."""
    model = tiny_model("llama", seed=6)
    for twin in ("model.layers.1.mlp.gate_proj", "model.layers.2.mlp.down_proj"):
        other = {"mlp.gate_proj": "model.layers.0.mlp.up_proj", "mlp.down_proj": "model.layers.0.mlp.down_proj"}
        source = model.get_submodule(other[twin.split(".", 3)[3]]).weight.data
        model.get_submodule(twin).weight.data = source + 0.01 * torch.randn(
            source.shape, generator=torch.Generator().manual_seed(1)
        )
    view = discover(model)
    tokens = torch.randint(VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(0))
    store = StatisticsStore(tmp_path_factory.mktemp("pairs") / "s", {"run": 4})
    collect(view, tokens, store=store)
    return SimpleNamespace(view=view, store=store, tokens=tokens)


class TestPairs:
    """GeoPair's matching."""

    def plan(self, alike, folder, **settings):
        recipe = Recipe(method="geopair", keep=0.6, options={"rounds": 2}, **settings)
        start = make_plan(alike.view, recipe)
        context = run_context(alike.view, alike.store, alike.tokens)
        return start, final_plan(context, recipe, start, journal_in(folder))

    def test_weights_that_look_alike_share_a_dictionary(self, alike, tmp_path):
        start, plan = self.plan(alike, tmp_path / "j")
        pairs = {frozenset(g.spec.modules) for g in plan.groups}
        assert frozenset({"model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"}) in pairs
        assert frozenset({"model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"}) in pairs
        assert plan.bytes_after <= 0.6 * start.bytes_before
        assert plan.bytes_before == start.bytes_before
        assert sorted(m for g in plan.groups for m in g.spec.modules) == sorted(alike.view.module_names)
        # 18 weights of 24 inputs and three of 44: one stays alone
        assert sorted(len(g.spec.modules) for g in plan.groups) == [1] + [2] * 10
        by_name = {name: group for group in alike.view.groups for name in group.modules}
        for group in plan.groups:
            read = [by_name[name] for name in group.spec.modules]
            assert set(group.sources) == set(read)
            assert group.own_input == (len(set(read)) == 1)

    @pytest.mark.parametrize("allocation", ["pooled", "truncation", "rocket", "knapsack"])
    def test_where_all_are_paired_nothing_is_left_to_allocate(self, tmp_path, allocation):
        view = discover(tiny_model("llama", num_hidden_layers=2))
        store = StatisticsStore(tmp_path / "s", {"run": 5})
        collect(view, token_ids(4, 30), store=store)
        world = SimpleNamespace(view=view, store=store, tokens=token_ids(4, 30))
        start, plan = self.plan(world, tmp_path / "j", allocation=allocation)
        assert plan.bytes_after <= 0.6 * start.bytes_before
        assert all(len(g.spec.modules) == 2 for g in plan.groups)

    def test_the_pairs_survive_an_interruption(self, alike, tmp_path, monkeypatch):
        _, plan = self.plan(alike, tmp_path / "j")
        monkeypatch.setattr("cospadi.engine.allocate.rules.matched", lambda *_: pytest.fail("computed again"))
        assert self.plan(alike, tmp_path / "j")[1] == plan

    def test_neighbours_on_request(self, alike, tmp_path):
        start, plan = self.plan(alike, tmp_path / "j", grouping="cross_layer")
        assert plan is start

    def test_a_whole_run(self, source, tmp_path):
        out = tmp_path / "out"
        result = compress(
            source, out, keep=0.6, method="geopair", options={"rounds": 2}, calibration=[tiny_text(900)],
            recipe=Recipe(calibration=CALIBRATION), device="cpu",
        )  # fmt: skip
        assert result.report["keep_actual"] <= 0.6
        assert all(0 < row["error"] < 1 for row in result.report["groups"])
        with torch.no_grad():
            assert checkpoint.load(out)(token_ids(1, 9)).logits.isfinite().all()
