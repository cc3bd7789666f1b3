"""compressed-tensors' names for options: accepted, stored under ours."""

import pytest
from pydantic import BaseModel

from cospadi.aliases import ALIASES, canonical
from cospadi.errors import RecipeError
from cospadi.evaluation.entries import make_entries
from cospadi.methods import all_methods, get_method
from cospadi.methods.options import checked_options
from cospadi.recipe import Recipe


def test_aliases_stand_for_options_that_exist():
    known = {option for method in all_methods().values() for option in method.options.model_fields}
    assert set(ALIASES.values()) <= known and not set(ALIASES) & known


def test_a_method_takes_both_names():
    gptq = get_method("gptq")
    assert gptq.check({"num_bits": 4, "group_size": 128}) == gptq.check({"bits": 4, "group": 128})
    with pytest.raises(RecipeError, match="option 'group' cannot be -5: it must be at least 0"):
        gptq.check({"group_size": -5})


def test_a_recipe_stores_the_canonical_name(tmp_path):
    recipe = Recipe(method="gptq", keep=0.3, options={"num_bits": 4, "group_size": 128})
    assert recipe.options == {"bits": 4, "group": 128}
    assert recipe == Recipe(method="gptq", keep=0.3, options={"bits": 4, "group": 128})
    (tmp_path / "r.yaml").write_text("method: gptq\noptions: {group_size: 32}\n")
    loaded = Recipe.load(tmp_path / "r.yaml")
    assert "group: 32" in loaded.to_yaml() and "group_size" not in loaded.to_yaml()


def test_an_alias_overrides_the_option_it_stands_for():
    recipe = Recipe(method="gptq", options={"group": 64, "bits": 3})
    assert recipe.merged({"options": {"group_size": 128}}).options == {"group": 128, "bits": 3}


def test_both_names_at_once_are_refused():
    with pytest.raises(RecipeError, match="'group' and 'group_size' are the same"):
        Recipe(method="gptq", options={"group": 64, "group_size": 128})
    with pytest.raises(RecipeError, match="'num_bits' and 'bits' are the same"):
        get_method("gptq").check({"num_bits": 4, "bits": 4})


def test_a_plug_in_may_use_the_other_name_itself():
    class Theirs(BaseModel):
        group_size: int = 64

    stored = Recipe(method="theirs", options={"group_size": 32}).options
    assert checked_options("theirs", Theirs, stored) == {"group_size": 32}
    assert canonical({"group_size": 8, "rounds": 1}, ["group_size", "rounds"]) == {"group_size": 8, "rounds": 1}


def test_an_option_that_a_method_lacks_is_named():
    with pytest.raises(RecipeError, match="method 'pursuit' has no option 'num_bits'"):
        get_method("pursuit").check({"num_bits": 4})


def test_a_comparison_takes_both_names():
    base = Recipe(method="gptq", options={"bits": 4, "group": 64})
    (entry,) = make_entries(base, ["gptq"], [0.3], {"gptq": {"group_size": 32}}, {}, [])
    assert entry.recipe.options == {"bits": 4, "group": 32}
