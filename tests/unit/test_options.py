"""Python's functions and the commands take the same options under the same names."""

import inspect
from collections.abc import Sequence
from typing import get_type_hints

import pytest
import typer

import cospadi
from cospadi.cli.app import app
from cospadi.errors import BudgetError, RecipeError
from cospadi.methods import all_methods
from cospadi.options import CALIBRATION, PRUNE, SETTINGS, prune_recipe_from, recipe_from
from cospadi.pruning import all_pruning_methods
from cospadi.recipe import Calibration, Recipe

COMMANDS = typer.main.get_command(app).commands
FUNCTIONS = [name for name in cospadi.__all__ if name in COMMANDS]
RENAMED = {"set_": "options", "compile_": "compile", "directory": "model"}
"""Names that Python keeps for itself, and the argument that every function calls alike."""
OF_THE_CONSOLE = {"json_", "dry_run", "help"}
OF_PYTHON = {"tokenizer", "progress", "command", "more", "recipes"}


def of_the_command(name: str) -> set[str]:
    found = {RENAMED.get(option.name, option.name) for option in COMMANDS[name].params} - OF_THE_CONSOLE
    if name in ("inspect", "export"):
        found = found - {"model", "dense"} | {"directory"}  # dense is the only form of export there is
    return found


def test_every_command_that_works_on_models_has_a_function():
    assert set(COMMANDS) - set(FUNCTIONS) == {"demo", "methods"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_its_command_takes(name):
    taken = set(inspect.signature(getattr(cospadi, name)).parameters)
    assert of_the_command(name) - taken == set()
    spare = taken - of_the_command(name) - OF_PYTHON
    recipe = {"compress": set(SETTINGS), "estimate": {*SETTINGS, "rehearse"}}
    assert spare <= recipe.get(name, set(CALIBRATION))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_editor_can_complete_the_options(name):
    function = getattr(cospadi, name)
    hints = get_type_hints(function)
    assert set(inspect.signature(function).parameters) <= set(hints) and "return" in hints
    for option in inspect.signature(function).parameters:
        assert f"{option}:" in (function.__doc__ or "") or option == "more", option


def test_compress_takes_every_key_of_a_recipe():
    named = set(inspect.signature(cospadi.compress).parameters)
    assert named >= set(SETTINGS)
    assert set(CALIBRATION.values()) == set(Calibration.model_fields)
    assert set(inspect.signature(cospadi.prune).parameters) >= set(PRUNE)


def test_the_types_of_options_are_those_of_a_recipe():
    hints = get_type_hints(cospadi.compress)
    for name in ("grouping", "allocation", "gram", "method", "text_field", "samples", "seq_len", "seed", "sequential"):
        field = Calibration.model_fields[CALIBRATION[name]] if name in CALIBRATION else Recipe.model_fields[name]
        assert str(hints[name]).removesuffix(" | None") == str(field.annotation or "").removesuffix(" | None") or (
            str(hints[name]) == f"{field.annotation.__name__} | None"  # a field with a default of its own
        )
    assert get_type_hints(cospadi.compress)["only"] == str | Sequence[str] | None


def test_options_of_methods_have_names_of_their_own():
    """Where both have a name, the flat one is the run's, and the method's is given in `options`."""
    for kind, function in ((all_methods(), cospadi.compress), (all_pruning_methods(), cospadi.prune)):
        taken = set(inspect.signature(function).parameters)
        shared = {method.name: {*method.options.model_fields} & taken for method in kind.values()}
        assert {name: both for name, both in shared.items() if both} == (
            {key: {"samples"} for key in ("laco", "replaceme", "sleb")} if function is cospadi.prune else {}
        )
    recipe = prune_recipe_from(None, {"method": "laco", "samples": 5, "options": {"samples": 3}})
    assert (recipe.calibration.samples, recipe.prune.options) == (5, {"samples": 3})


def test_flat_options_find_their_place():
    base = Recipe(method="pursuit", options={"rho": 3}, calibration={"samples": 7})
    flat = {"keep": "30%", "seq_len": 64, "text_field": "body", "rounds": 4, "only": ("q_proj",), "seed": None}
    recipe = recipe_from(base, flat | {"calibration": "text.jsonl", "bos": "on", "gram": "loss", "gram_blend": 0.5})
    assert recipe.keep == 0.3 and recipe.only == ["q_proj"] and recipe.seed == 0
    assert (recipe.gram, recipe.gram_blend, recipe.options) == ("loss", 0.5, {"rho": 3, "rounds": 4})
    assert recipe.calibration == Calibration(samples=7, seq_len=64, field="body", source="text.jsonl", bos="on")
    assert recipe_from(base, {"num_bits": 4, "method": "rtn"}).options == {"bits": 4}
    assert recipe_from(None, {"calibration": {"samples": 5}, "seq_len": 9}).calibration == Calibration(
        samples=5, seq_len=9
    )
    with pytest.raises(BudgetError, match="both given"):
        recipe_from(None, {"keep": 0.5, "target_size": "5GB"})


def test_flat_options_of_pruning_find_their_place():
    recipe = prune_recipe_from({"prune": {"method": "laco"}}, {"blocks": 2, "merge": 3, "samples": 4, "device": "cpu"})
    assert (recipe.prune.method, recipe.prune.blocks, recipe.prune.options) == ("laco", 2, {"merge": 3})
    assert (recipe.calibration.samples, recipe.device) == (4, "cpu")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: recipe_from(None, {"sampels": 4}), "unknown option 'sampels'.*did you mean 'samples'"),
        (lambda: recipe_from(None, {"kep": 0.4}), "did you mean 'keep'"),
        (lambda: recipe_from({"method": "pursuit"}, {"ronds": 4}), "did you mean 'rounds'"),
        (lambda: recipe_from({"method": "rtn"}, {"zzzz": 4}), "unknown option 'zzzz'; method 'rtn' takes .*bits"),
        (lambda: recipe_from({"method": "rtn"}, {"rho": 4}), "'rtn' has no option 'rho'; methods with it: .*pursuit"),
        (lambda: recipe_from(None, {"samples": 0}), r"calibration\.samples cannot be 0"),
        (lambda: prune_recipe_from(None, {"block": 1}), "unknown option 'block'.*did you mean 'blocks'"),
        (lambda: prune_recipe_from({"prune": {"method": "laco"}}, {"merg": 1}), "did you mean 'merge'"),
        (lambda: cospadi.compress("m", "o", sampels=4), "did you mean 'samples'"),
        (lambda: cospadi.prune("m", "o", bloks=4), "did you mean 'blocks'"),
        (lambda: cospadi.estimate("m", keeep=0.4), "did you mean 'keep'"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(make, words):
    with pytest.raises(RecipeError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
