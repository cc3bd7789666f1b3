"""Allocation across groups: measured sensitivity, budgets, and the plan that survives an interruption."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cospadi.calibration import StatisticsStore, collect
from cospadi.checkpoint import factor_bytes, load
from cospadi.engine.allocate import by_trials, trials
from cospadi.engine.allocate import loss_model as profile
from cospadi.engine.allocate.candidates import Task, loss_curve, solve_trial
from cospadi.engine.allocate.compare_plans import best_plan
from cospadi.engine.allocate.loss_model import Option, piece_spec
from cospadi.engine.allocate.rules import final_plan
from cospadi.engine.allocate.sensitivity import SensitivityMeter, probe_ids
from cospadi.engine.compress import compress
from cospadi.engine.plan.plan import make_plan
from cospadi.errors import BudgetError
from cospadi.methods import GroupShape, get_method
from cospadi.methods.representation import Representation, representations
from cospadi.model_view import discover
from cospadi.recipe import Recipe
from runs import journal_in, run_context
from tiny import ARCHITECTURES, VOCABULARY, save_tiny, tiny_model, tiny_text

CPU = torch.device("cpu")
WIDE = {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "head_dim": 12}


def ids(seed: int, sequences: int = 6, length: int = 40) -> torch.Tensor:
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model whose second attention output hardly reaches the residual stream, with statistics."""
    model = tiny_model("llama", seed=3, **WIDE)
    for parameter in model.parameters():  # random transformers predict next to nothing; this one has opinions
        if parameter.ndim == 2:
            parameter.data *= 5
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.data *= 1e-4
    view = discover(model)
    store = StatisticsStore(tmp_path_factory.mktemp("statistics"), {"run": 1})
    collect(view, ids(0), store=store)
    return SimpleNamespace(model=model, view=view, store=store, ids=ids(0))


def planned(world, folder, recipe, seen=None):
    start = make_plan(world.view, recipe)
    context = run_context(world.view, world.store, world.ids, seen=seen, seed=recipe.seed)
    return start, final_plan(context, recipe, start, journal_in(folder))


def share(plan, part):
    return next(g.spec.bytes / g.spec.dense_bytes for g in plan.groups if part in g.spec.name)


@pytest.mark.parametrize(
    ("sequences", "length", "expected"), [(64, 512, (8, 256)), (3, 900, (3, 683)), (20, 40, (20, 40)), (1, 30, (1, 30))]
)
def test_sensitivity_is_measured_on_many_short_texts(sequences, length, expected):
    tokens = torch.arange(sequences * length).view(sequences, length)
    probe = probe_ids(tokens)
    assert tuple(probe.shape) == expected
    assert torch.equal(probe, tokens[: expected[0], : expected[1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergences_are_those_of_the_whole_model_with_one_group_replaced(architecture):
    model = tiny_model(architecture, seed=5)
    view = discover(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, generator = ids(7, 3, 21), torch.Generator().manual_seed(1)
    trials = []
    for group in view.groups:
        noise = [0.3 * torch.randn(group.d_in, d, generator=generator) for d in group.d_out]
        trials.append((group, {m: view.weight(m) + n for m, n in zip(group.modules, noise, strict=True)}))
    with SensitivityMeter(view, tokens, CPU) as meter:
        for layer in range(len(view.layers)):
            meter.layer(layer, [weights for group, weights in trials if group.layer == layer])
        found = meter.divergences()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        expected = model(tokens).logits.double().log_softmax(-1)
        for (_, weights), divergence in zip(trials, found, strict=True):
            model.load_state_dict(before | {f"{m}.weight": w.T for m, w in weights.items()})
            got = model(tokens).logits.double().log_softmax(-1)
            kl = float((expected.exp() * (expected - got)).sum()) / tokens.numel()
            assert divergence == pytest.approx(kl, rel=1e-3, abs=1e-7)
            assert kl > 1e-7


def test_variants_may_differ_from_the_original_in_every_layer():
    model = tiny_model("llama", seed=5)
    view = discover(model)
    tokens, generator = ids(7, 3, 21), torch.Generator().manual_seed(2)
    changed = [
        {m: view.weight(m) + scale * torch.randn(view.weight(m).shape, generator=generator) for m in view.module_names}
        for scale in (0.1, 0.3)
    ]
    with SensitivityMeter(view, tokens, CPU) as meter:
        for layer in range(len(view.layers)):
            inside = [{m: w for m, w in new.items() if m.startswith(f"model.layers.{layer}.")} for new in changed]
            meter.layer(layer, inside if layer == 0 else (), inside if layer else ())
        found = meter.divergences()
    with torch.no_grad():
        expected = model(tokens).logits.double().log_softmax(-1)
        for new, divergence in zip(changed, found, strict=True):
            model.load_state_dict(model.state_dict() | {f"{m}.weight": w.T for m, w in new.items()})
            got = model(tokens).logits.double().log_softmax(-1)
            kl = float((expected.exp() * (expected - got)).sum()) / tokens.numel()
            assert divergence == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_of_several_plans_the_one_that_loses_least_is_found(world, first):
    small, large = (make_plan(world.view, Recipe(keep=keep, allocation="uniform")) for keep in (0.25, 0.8))
    seen = []
    context = run_context(world.view, world.store, world.ids, seen=seen)
    found = best_plan(context, [large, small] if first else [small, large])
    assert found == (0 if first else 1)
    assert seen[0][:3] == ("plan", 0, 2)
    assert seen[-1][:3] == ("plan", 2, 2)


@pytest.mark.parametrize("better", [0, 1])
def test_a_plan_without_pruned_weights_is_taken_where_it_loses_less_as_a_whole(world, tmp_path, monkeypatch, better):
    compared = []
    monkeypatch.setattr(by_trials, "best_plan", lambda context, plans: compared.extend(plans) or better)
    start, plan = planned(world, tmp_path / "j", Recipe(method="auto", keep=0.25, options={"bits": 16}))
    assert plan == compared[better]
    methods = [{group.spec.method for group in plan.groups} for plan in compared]
    assert "sparsegpt" in methods[0]
    assert methods[1] == {"pursuit"}
    assert all(plan.bytes_after <= start.budget for plan in compared)


@pytest.mark.parametrize(
    ("method", "allocation", "options"),
    [
        ("pursuit", "knapsack", {"rounds": 4}),
        ("rocket", None, {}),
        ("compot", None, {"rounds": 3}),
        ("svd_llm_v2", None, {}),
        ("svd_llm", "knapsack", {}),
    ],
)
def test_bytes_are_used_up_but_never_exceeded(world, tmp_path, method, allocation, options):
    recipe = Recipe(method=method, keep=0.5, allocation=allocation, options=options)
    start, plan = planned(world, tmp_path / "j", recipe)
    assert plan.bytes_after <= start.budget
    assert plan.keep_actual >= 0.5 * 0.97  # matrices of 48 rows: one atom is a per cent
    assert [g.spec.modules for g in plan.groups] == [g.spec.modules for g in start.groups]
    assert [g.spec.bytes for g in plan.groups] != [g.spec.bytes for g in start.groups]
    for group in plan.groups:
        assert group.spec.method == method


def test_bytes_go_where_they_help(world, tmp_path):
    recipe = Recipe(method="pursuit", keep=0.5, allocation="knapsack", options={"rounds": 6})
    start, plan = planned(world, tmp_path / "j", recipe)
    quiet = share(plan, "layers.1.self_attn.o_proj")
    assert quiet < 0.75 * share(start, "layers.1.self_attn.o_proj")
    assert quiet == min(g.spec.bytes / g.spec.dense_bytes for g in plan.groups)
    assert quiet > 0.5 / 1.4 - 0.03  # no less, however quiet; sizes differ by an atom


def test_a_resumed_run_reads_its_plan(world, tmp_path, monkeypatch):
    recipe, events = Recipe(method="pursuit", keep=0.6, allocation="knapsack", options={"rounds": 3}), []
    _, first = planned(world, tmp_path / "j", recipe, seen=events)
    assert events
    assert events[-1][:3] == ("plan", len(first.groups), len(first.groups))
    _, anew = planned(world, tmp_path / "other", recipe)
    assert anew == first
    monkeypatch.setattr(by_trials, "profile", lambda *_, **__: pytest.fail("computed again"))
    _, again = planned(world, tmp_path / "j", recipe)
    assert again == first


def test_the_plan_of_another_run_is_not_taken_over(world, tmp_path):
    recipe = Recipe(method="compot", keep=0.6)
    _, first = planned(world, tmp_path / "j", recipe)
    _, other = planned(world, tmp_path / "j", recipe.merged({"keep": 0.4}))
    assert other.bytes_after < first.bytes_after


def test_uniform_plans_stay_as_they_are(world, tmp_path):
    uniform = Recipe(method="pursuit", keep=0.6, allocation="uniform")
    start, plan = planned(world, tmp_path / "j", uniform)
    assert plan is start


def test_a_hopeless_budget_names_the_least_possible(world, tmp_path):
    recipe = Recipe(method="auto", keep=0.4)
    start = make_plan(world.view, recipe)
    context = run_context(world.view, world.store, world.ids)
    tiny = replace(start, keep_requested=0.004)
    with pytest.raises(BudgetError, match=r"least possible is [\d,]+ \(keep 0\.\d+\)"):
        final_plan(context, recipe, tiny, journal_in(tmp_path / "j"))


def test_auto_with_16_bits_offers_values_of_16_bits_only():
    shape = GroupShape(("a", "b"), 96, (80, 40))
    offered = representations(get_method("auto"), {"bits": 16})
    specs = [spec for family in offered for spec in family.specs(shape, [0.3, 0.6, 0.9])]
    assert len(specs) >= 3
    assert all(spec.codes.sparse and spec.codes.bits == 16 for spec in specs)
    assert {None if spec.dictionary is None else spec.dictionary.bits for spec in specs} == {None, 16}


def test_what_has_room_for_everything_measures_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(profile.SensitivityMeter, "layer", lambda *_: pytest.fail("measured"))
    start, plan = planned(world, tmp_path / "j", Recipe(method="auto", keep=0.9))
    assert plan.bytes_after <= start.budget
    assert {g.spec.codes.bits for g in plan.groups} == {8}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A plan of `auto` for a model whose values weigh far more than its queries, and how it came about."""
    model = tiny_model("llama", seed=4, num_hidden_layers=4)
    for layer in range(4):
        model.get_submodule(f"model.layers.{layer}.self_attn.q_proj").weight.data *= 0.02
        model.get_submodule(f"model.layers.{layer}.self_attn.v_proj").weight.data *= 4
    view = discover(model)
    folder = tmp_path_factory.mktemp("auto")
    store = StatisticsStore(folder / "s", {"run": 2})
    collect(view, ids(0), store=store)
    solved, own, found = [], trials.solve_trial, []

    def counted(task, family, spec):
        solved.append((family, spec))
        return own(task, family, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "solve_trial", counted)
        patch.setattr(by_trials, "profile", lambda *a, **k: found.extend(profile.profile(*a, **k)) or found)
        world = SimpleNamespace(view=view, store=store, ids=ids(0, 2))
        start, plan = planned(world, folder / "j", Recipe(method="auto", keep=0.3, options={"favour": "speed"}))
    return SimpleNamespace(view=view, store=store, start=start, plan=plan, solved=solved, found=found, folder=folder)


def test_auto_mixes_representations_within_the_budget(mixed):
    assert mixed.plan.bytes_after <= mixed.start.budget
    assert {g.spec.method for g in mixed.plan.groups} <= {"pursuit", "gptq"}
    assert len({(g.spec.codes.bits, g.spec.codes.group) for g in mixed.plan.groups}) > 1
    assert sorted(m for g in mixed.plan.groups for m in g.spec.modules) == sorted(mixed.view.module_names)


def test_layers_with_one_input_get_the_bits_that_each_needs(mixed):
    bits = {m.split(".", 2)[2]: g.spec.codes.bits for g in mixed.plan.groups for m in g.spec.modules}
    for layer in range(4):
        assert bits[f"{layer}.self_attn.q_proj"] < bits[f"{layer}.self_attn.v_proj"]


def test_pieces_that_choose_the_same_stay_together(mixed):
    start = next(g for g in mixed.start.groups if len(g.spec.modules) == 3)
    first, second = (Representation("gptq", {"bits": bits, "group": 32}, fixed=True, each=True) for bits in (2, 4))
    shape = start.spec.shape
    specs = {family.options["bits"]: family.specs(shape, [0.01, 0.99])[0] for family in (first, second)}
    parts = tuple(
        (family, piece_spec(specs[family.options["bits"]], i)) for i, family in enumerate((first, second, first))
    )
    option = Option(parts, 0.0)
    settled = by_trials.settled(start, option)
    names = start.spec.modules
    assert [g.spec.modules for g in settled] == [(names[0], names[2]), (names[1],)]
    assert [g.spec.codes.bits for g in settled] == [2, 4]
    assert sum(g.spec.bytes for g in settled) == option.bytes
    assert all(g.source is start.source and g.spec.method == "gptq" for g in settled)
    (whole,) = by_trials.settled(start, Option(tuple((first, piece_spec(specs[2], i)) for i in range(3)), 0.0))
    assert whole.spec == specs[2]


def test_pieces_of_one_method_and_other_sizes_are_stored_apart(mixed):
    start = next(g for g in mixed.start.groups if len(g.spec.modules) == 3)
    family = Representation("sparsegpt", {}, each=True)
    shape = start.spec.shape
    small, large = family.specs(shape, [0.3, 0.8])
    option = Option(tuple((family, piece_spec(spec, i)) for i, spec in enumerate((small, large, small))), 0.0)
    settled = by_trials.settled(start, option)
    names = start.spec.modules
    assert [g.spec.modules for g in settled] == [(names[0], names[2]), (names[1],)]
    assert [g.spec.codes.pattern for g in settled] == [small.codes.pattern, large.codes.pattern]
    assert sum(g.spec.bytes for g in settled) == option.bytes


def test_a_plan_of_pieces_is_read_back(mixed):
    context = run_context(mixed.view, mixed.store, ids(0, 2))
    recipe = Recipe(method="auto", keep=0.3, options={"favour": "speed"})
    assert final_plan(context, recipe, mixed.start, journal_in(mixed.folder / "j")) == mixed.plan


def test_errors_of_other_group_sizes_are_carried_over_from_the_first_layers(mixed):
    teachers = {spec.modules[0].split(".")[2] for family, spec in mixed.solved if family.learnt}
    assert teachers == {"0", "1"}
    late = next(p for p in mixed.found if p.shape.modules[0] == "model.layers.3.mlp.down_proj")
    group = next(g for g in mixed.start.groups if g.spec.modules == late.shape.modules)
    near = loss_curve(late.losses[0])
    learnt = [option for option in late.options if option.parts[0][0].learnt]
    assert len(learnt) > 3
    context = run_context(mixed.view, mixed.store, ids(0, 2))
    task = Task.of(context.problem(late.shape.modules, group.sources, group.spec.name), [24])
    for option in learnt[::2]:
        truth, _ = solve_trial(task, *option.parts[0])
        assert option.loss == pytest.approx(near(truth.total), rel=0.4)


@pytest.mark.parametrize(("keep", "bits"), [(0.16, "any"), (0.35, "any"), (0.6, 16)])
def test_a_mixed_checkpoint_loads_and_has_the_bytes_it_says(tmp_path, keep, bits):
    source = save_tiny(tmp_path / "m", "llama", **WIDE)
    result = compress(
        source, tmp_path / "out", keep=keep, method="auto", calibration=[tiny_text(900)], device="cpu",
        recipe=Recipe(calibration={"samples": 6, "seq_len": 40}, options={"bits": bits}),
    )  # fmt: skip
    report = result.report
    assert report["keep_actual"] <= keep
    assert sum(row["bytes"] for row in report["groups"]) == report["bytes_after"]
    assert factor_bytes(tmp_path / "out") == report["bytes_after"]
    with torch.no_grad():
        assert load(tmp_path / "out")(ids(3, 1, 9)).logits.isfinite().all()
