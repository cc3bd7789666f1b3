"""The method on random matrices: spectra, factors and specs against explicit references in float64."""

from dataclasses import replace

import pytest
import torch

from cospadi.engine.plan.plan import make_plan
from cospadi.engine.plan.selection import attention_modules, chosen_modules, matching, narrowed, restricted
from cospadi.errors import ModelError, RecipeError
from cospadi.format import GroupShape, SharedSpec
from cospadi.masa.retrofit.atoms import MasaOptions, choices_of, search, split_projection
from cospadi.masa.retrofit.matrix_pca import matrix_pca
from cospadi.methods import Problem, get_method
from cospadi.methods.masa import masa, masa_plan
from cospadi.model_view import discover
from cospadi.recipe import Recipe
from tiny import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model

ABSOLUTE = MasaOptions(relative=False)
NAMES = tuple(f"m.{i}.q" for i in range(4))


def problem(shape=(9, 6), layers=4, seed=0, rank_deficient=False):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights, grams = [], []
    for layer in range(layers):
        weights.append(common + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64))
        x = torch.randn(5 if rank_deficient else 40, shape[0], generator=generator, dtype=torch.float64)
        x = (layer + 1) * x * torch.rand(shape[0], generator=generator, dtype=torch.float64)
        grams.append(x.T @ x / len(x))
    return Problem("test", tuple(weights), tuple(grams))


def ridged(gram):
    return gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def missed(given, spec, weights):
    return sum(
        float(torch.trace((a - b).T @ ridged(g) @ (a - b)))
        for a, b, g in zip(given.weights, weights, given.grams, strict=True)
    )


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("rank_deficient", [False, True])
def test_choices_are_what_explicit_atoms_leave(shape, rank_deficient):
    given = problem(shape, rank_deficient=rank_deficient)
    family = choices_of(given.weights, given.grams, NAMES, ABSOLUTE)
    assert [choice.atoms for choice in family.choices] == [0, 1, 2, 3, 4]
    assert family.rank_bytes == 2 * sum(shape)
    for choice in family.choices:
        whole = choice.atoms == 4
        assert choice.bytes == 2 * choice.atoms * (54 + (0 if whole else 4))
        if whole:
            assert not any(len(values) for values in choice.gains)
            continue
        atoms, _ = matrix_pca(given.weights, max(choice.atoms, 1))
        for weight, gram, values in zip(given.weights, given.grams, choice.gains, strict=True):
            root = torch.linalg.cholesky(ridged(gram)).T
            residual = root @ weight
            if choice.atoms:
                columns = torch.stack([(root @ atom).flatten() for atom in atoms], 1)
                best = torch.linalg.lstsq(columns, residual.flatten()[:, None]).solution
                residual = residual - (columns @ best).view(shape)
            expected = torch.linalg.svdvals(residual).square()
            torch.testing.assert_close(torch.from_numpy(values.copy()), expected, rtol=1e-6, atol=1e-9)


def test_relative_errors_are_shares_of_each_layers_energy():
    given = problem()
    absolute = choices_of(given.weights, given.grams, NAMES, ABSOLUTE)
    relative = choices_of(given.weights, given.grams, NAMES, MasaOptions())
    for a, r in zip(absolute.choices, relative.choices, strict=True):
        for layer, (weight, gram) in enumerate(zip(given.weights, given.grams, strict=True)):
            energy = float(torch.trace(weight.T @ ridged(gram) @ weight))
            assert a.gains[layer].sum() == pytest.approx(energy * r.gains[layer].sum(), rel=1e-9)
    assert relative.choices[0].error == pytest.approx(4)


@pytest.mark.parametrize("atoms", [0, 1, 2, 3, 4])
def test_factors_miss_exactly_what_the_search_predicted(atoms):
    given = problem(seed=atoms)
    choice = choices_of(given.weights, given.grams, NAMES, ABSOLUTE).choices[atoms]
    ranks = (0, 0, 0, 0) if atoms == 4 else (1, 3, 2, 6)
    spec = SharedSpec(NAMES, 9, 6, atoms, ranks)
    tensors = masa(replace(given, dtype=torch.float64), spec).tensors()
    predicted = sum(float(values[rank:].sum()) for values, rank in zip(choice.gains, ranks, strict=True))
    assert missed(given, spec, spec.rebuild(tensors)) == pytest.approx(predicted, rel=1e-6, abs=1e-9)
    table = {f"{i}.{leaf}": shape for i in range(4) for leaf, (shape, _) in spec.tensors(i).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_to_the_last_bit_with_as_many_atoms_as_layers(dtype):
    given = problem()
    kept = [w.to(dtype) for w in given.weights]
    stored = Problem("test", tuple(w.double() for w in kept), given.grams)
    spec = SharedSpec(NAMES, 9, 6, 4, (0,) * 4)
    found = spec.rebuild(masa(replace(stored, dtype=dtype), spec).tensors())
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_rounding_to_16_bits_costs_little(dtype, scale):
    given = problem((40, 30), seed=5)
    given = Problem("test", tuple(scale * w for w in given.weights), given.grams)
    choice = choices_of(given.weights, given.grams, NAMES, ABSOLUTE).choices[2]
    spec = SharedSpec(NAMES, 40, 30, 2, (10,) * 4)
    tensors = masa(replace(given, dtype=dtype), spec).tensors()
    assert all(t.dtype == dtype for t in tensors.values())
    found = missed(given, spec, spec.rebuild(tensors))
    predicted = sum(float(values[10:].sum()) for values in choice.gains)
    energy = choices_of(given.weights, given.grams, NAMES, ABSOLUTE).choices[0].error
    assert abs(found - predicted) < 2e-5 * energy + 1e-2 * predicted


def test_sharing_beats_low_rank_where_matrices_are_alike():
    """Layers that differ by little share one atom; the search finds that, and stays within its bytes."""
    given = problem((24, 24), seed=7)
    common = given.weights[0]
    alike = tuple(common + 0.02 * w for w in given.weights)
    shapes = [GroupShape(NAMES, 24, (24,) * 4)]
    budget = int(0.5 * shapes[0].dense_bytes)
    errors = {}
    for atoms in (0, None):
        specs = search(
            shapes,
            lambda name: int(name.split(".")[1]),
            torch.zeros(3),
            lambda part: (alike, given.grams),
            budget,
            MasaOptions(atoms=atoms),
            lambda *_: None,
        )
        (spec,) = specs
        assert spec.bytes <= budget
        tensors = masa(Problem("p", alike, given.grams, dtype=torch.float64), spec).tensors()
        errors[atoms] = missed(Problem("p", alike, given.grams), spec, spec.rebuild(tensors))
    assert spec.atoms >= 1 and errors[None] < 0.1 * errors[0]


def test_dependent_matrices_and_silent_inputs():
    given = problem()
    first, second = given.weights[:2]
    twins = Problem("twins", (first, second, first, first - second), (*given.grams[:3], torch.zeros(9, 9)))
    family = choices_of(twins.weights, twins.grams, NAMES, MasaOptions())
    assert [choice.atoms for choice in family.choices] == [0, 1, 2, 4]
    assert family.choices[2].error < 1e-20
    for atoms in (2, 3):  # of three atoms one is empty
        spec = SharedSpec(NAMES, 9, 6, atoms, (0,) * 4)
        for found, weight in zip(
            spec.rebuild(masa(replace(twins, dtype=torch.float64), spec).tensors()), twins.weights, strict=True
        ):
            torch.testing.assert_close(found, weight, rtol=0, atol=1e-9)


def test_plan_from_shapes_fits():
    shape = GroupShape(NAMES, 30, (20,) * 4)
    for budget in range(500, 4801, 50):
        spec = masa_plan(shape, budget)
        assert spec.bytes <= budget and spec.atoms <= 4
        more = 4 * 2 * 50
        assert spec.whole or spec.bytes + more > budget or min(spec.ranks) == 20
    assert masa_plan(shape, 4800).whole
    assert masa_plan(shape, 4799, atoms=2).atoms == 2
    assert masa_plan(shape, 0).ranks == (1,) * 4  # the least there is
    with pytest.raises(RecipeError, match="5 atoms for the 4 layers"):
        masa_plan(shape, 4800, atoms=5)


def test_more_atoms_than_layers_of_a_group():
    given = problem()
    for options in (MasaOptions(atoms=5), MasaOptions(least_atoms=5)):
        with pytest.raises(RecipeError, match=r"5 atoms for the 4 layers of m\.0\.q … m\.3\.q"):
            choices_of(given.weights, given.grams, NAMES, options)


def test_options_are_checked():
    method = get_method("masa")
    assert method.check({"groups": 2})["atoms"] is None
    for options, message in (
        ({"groups": 0}, "groups"),
        ({"groups": 2, "threshold": 0.1}, "give one of the two"),
        ({"atmos": 2}, "did you mean 'atoms'"),
    ):
        with pytest.raises(RecipeError, match=message):
            method.check(options)
    assert MasaOptions().layer_groups(torch.ones(8)) == [range(9)]
    assert len(MasaOptions().layer_groups(torch.ones(31))) == 3
    assert MasaOptions(threshold=0.5).layer_groups(torch.tensor([1.0, 0.1])) == [range(1), range(1, 3)]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_attention_is_found_without_names(architecture):
    view = discover(tiny_model(architecture))
    found = attention_modules(view)
    expected = {
        "phi3": ["qkv_proj", "o_proj"],
        "gpt_neox": ["query_key_value", "dense"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    }.get(architecture, ["q_proj", "k_proj", "v_proj", "o_proj"])
    per_layer = [name.rsplit(".", 1)[-1] for name in found]
    assert sorted(per_layer) == sorted(3 * expected)
    shapes = [group.spec.shape for group in make_plan(view, Recipe(method="masa", keep=0.7)).groups]
    assert len(shapes) == len(expected) and all(len(shape.modules) == 3 for shape in shapes)


def test_layers_of_unequal_shapes_are_kinds_of_their_own():
    model = tiny_model(num_hidden_layers=4)
    wide = torch.nn.Linear(24, 36, bias=False)
    model.model.layers[2].mlp.gate_proj = wide
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(24, 36, bias=False)
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(36, 24, bias=False)
    view = discover(model)
    plan = make_plan(view, Recipe(method="masa", keep=0.7, only=["gate_proj"]))
    shapes = [group.spec.shape for group in plan.groups]
    assert [shape.d_out for shape in shapes] == [(44,) * 3, (36,)]
    parts = [p for s in shapes for p in split_projection(s, lambda n: int(n.split(".")[2]), [range(2), range(2, 4)])]
    assert [[m.split(".")[2] for m in part.modules] for part in parts] == [["0", "1"], ["3"], ["2"]]


def test_a_model_without_attention_says_so():
    view = discover(tiny_model())
    bare = restricted(view, matching(view.module_names, ["mlp"]))
    with pytest.raises(ModelError, match="--only"):
        attention_modules(bare)


def test_patterns():
    view = discover(tiny_model())
    names = view.module_names
    assert matching(names, ["q_proj", "layers.1.mlp"]) == tuple(
        n for n in names if n.endswith("q_proj") or n.startswith("model.layers.1.mlp.")
    )
    assert len(matching(names, ["layers.*.self_attn.[qk]_proj"])) == 6
    assert matching(names, ["model.layers.0.mlp.up_proj"]) == ("model.layers.0.mlp.up_proj",)
    assert len(matching(names, ["self_attn"])) == 12
    for pattern in ("proj", "layers.9", "Q_proj"):
        with pytest.raises(RecipeError, match=rf"'{pattern}' matches none of 21 linear layers .*q_proj, k_proj"):
            matching(names, ["q_proj", pattern])
    assert chosen_modules(view, Recipe(keep=0.5)) == names
    assert chosen_modules(view, Recipe(keep=0.5, method="masa")) == matching(names, ["self_attn"])
    chosen = set(chosen_modules(view, Recipe(keep=0.5, only=["k_proj"])))
    small = restricted(view, chosen)
    assert [g.modules[0].rsplit(".", 1)[-1] for g in small.groups] == ["q_proj"] * 3  # whole groups: their statistics
    assert narrowed(small.groups[0], chosen).d_out == (12,)
