from pathlib import Path

import pytest

from cospadi.embedded import model_path
from cospadi.engine.estimate.estimate import estimate
from cospadi.methods import get_method
from cospadi.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    known = {"default", "dictionary", "small-and-fast", "faithful-cospadi", "low-bit", "prune-and-compress", "refined"}
    assert {path.stem for path in RECIPES} >= known


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_can_be_planned(path):
    recipe = Recipe.load(path)
    get_method(recipe.method).check(recipe.options)
    keep = estimate(model_path(), recipe).to_dict()["keep_actual"]
    assert recipe.keep is not None and keep <= recipe.keep
    assert keep > 0.9 * recipe.keep
    assert recipe.calibration.source is None  # the text is the user's


def test_the_default_recipe_says_what_the_defaults_are():
    recipe, plain = Recipe.load(RECIPES[0].with_name("default.yaml")), Recipe()
    assert recipe.calibration == plain.calibration and recipe.seed == plain.seed and recipe.method == plain.method
    method = get_method(recipe.method)
    assert method.check(recipe.options) == method.check({})


def test_the_faithful_recipe_is_that_of_the_paper():
    recipe = Recipe.load(RECIPES[0].with_name("faithful-cospadi.yaml"))
    plan = estimate(model_path(), recipe).plan
    assert all(len(group.spec.modules) == 1 for group in plan.groups)
    for group in plan.groups:
        assert group.spec.codes.bits == group.spec.dictionary.bits == 16
        assert group.spec.codes.nonzeros / group.spec.atoms == pytest.approx(0.5, abs=0.1)
