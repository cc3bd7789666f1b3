"""Options out of range are refused in one line that names option, value and what is allowed."""

from typing import Annotated, Literal, get_args, get_origin

import pytest
from pydantic import Field

from cospadi.engine.compress import compress
from cospadi.errors import RecipeError
from cospadi.format import GroupSpec
from cospadi.methods import METHODS, Problem, all_methods, get_method, method
from cospadi.methods.ranges import range_text
from cospadi.methods.sizing import low_rank_plan
from cospadi.recipe import Recipe

BAD = [
    ("pursuit", "rounds", -3, "at least 1"),
    ("pursuit", "rounds", 0, "at least 1"),
    ("pursuit", "steps", 0, "at least 1"),
    ("pursuit", "rho", 0, "at least 1"),
    ("pursuit", "ridge", -1, "at least 0"),
    ("pursuit", "refits", -1, "at least 0"),
    ("pursuit", "clip_search", -1, "at least 0"),
    ("pursuit", "group", -64, "at least 0"),
    ("pursuit", "dictionary_bits", 5, "2, 3, 4, 8 or 16"),
    ("pursuit", "value_bits", 1, "2, 3, 4, 8, 14 or 16"),
    ("pursuit", "pattern", "3:5", "m must be one of"),
    ("pursuit", "pattern", "dense", "neither 'free' nor 'n:m'"),
    ("pursuit", "rounds", 2.5, "integer"),
    ("pursuit", "ridge", float("nan"), "finite"),
    ("pursuit", "ridge", float("inf"), "finite"),
    ("cospadi", "power_iterations", 0, "at least 1"),
    ("cospadi", "rho", 0.5, "at least 1"),
    ("cospadi", "tolerance", 1, "at least 0 and less than 1"),
    ("cospadi", "tolerance", -0.1, "at least 0 and less than 1"),
    ("cospadi", "rounds", 0, "at least 1"),
    ("compot", "rounds", -1, "at least 0"),
    ("compot", "rho", -2, "at least 1"),
    ("rocket", "learning_rate", 0, "more than 0"),
    ("rocket", "importance_power", -0.5, "at least 0"),
    ("geopair", "cg_iterations", -1, "at least 0"),
    ("geopair", "htp_steps", 0, "at least 1"),
    ("svd_llm", "ridge", -1e-9, "at least 0"),
    ("svd_llm_v2", "ridge", -1, "at least 0"),
    ("basis_sharing", "ridge", -1, "at least 0"),
    ("asvd", "alpha", -0.5, "at least 0"),
    ("gptq", "damping", -0.01, "at least 0"),
    ("gptq", "sweeps", -1, "at least 0"),
    ("gptq", "bits", 5, "2, 3, 4 or 8"),
    ("rtn", "search", -1, "at least 0"),
    ("sparsegpt", "sweeps", -1, "at least 0"),
    ("wanda", "pattern", "free", "n:m"),
]


@pytest.mark.parametrize(("name", "option", "value", "allowed"), BAD)
def test_option_value_and_range_are_named(name, option, value, allowed):
    with pytest.raises(RecipeError) as caught:
        get_method(name).check({option: value})
    message = str(caught.value)
    assert "\n" not in message
    for part in (repr(name), repr(option), str(value), allowed):
        assert part in message


def test_bounds_themselves_are_allowed():
    least = {"rounds": 1, "steps": 1, "rho": 1, "ridge": 0, "refits": 0, "clip_search": 0, "group": 0}
    assert get_method("pursuit").check(least).items() >= least.items()
    assert get_method("cospadi").check({"tolerance": 0.999, "power_iterations": 1})["tolerance"] == 0.999
    assert get_method("compot").check({"rounds": 0})["rounds"] == 0


def test_no_number_of_any_method_is_unbounded():
    def literal(annotation):
        return get_origin(annotation) is Literal or any(literal(part) for part in get_args(annotation))

    for item in all_methods().values():
        for key, field in item.options.model_fields.items():
            kinds = {field.annotation, *get_args(field.annotation)} & {int, float}
            metadata = list(field.metadata)  # of a type such as `Annotated[int, …] | None` it lies one level deeper
            metadata += [m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())]
            assert not kinds or literal(field.annotation) or range_text(metadata), f"{item.name}.{key}"
        assert item.check({}) == {key: field.default for key, field in item.options.model_fields.items()}


def test_a_wrong_option_comes_to_light_before_anything_is_read(tmp_path):
    recipe = Recipe(method="pursuit", keep=0.8, options={"rounds": 0}, calibration={"source": "no such text"})
    with pytest.raises(RecipeError, match="'rounds' cannot be 0: it must be at least 1"):
        compress(tmp_path / "no such model", tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_an_option_of_another_method_names_those_that_have_it():
    with pytest.raises(
        RecipeError,
        match=r"'auto' has no option 'value_bits'; it takes bits, favour, state; methods with it: .*pursuit",
    ):
        get_method("auto").check({"value_bits": 8})
    with pytest.raises(RecipeError, match=r"did you mean 'rounds'\?$"):
        get_method("pursuit").check({"round": 8})


def test_plug_ins_say_their_ranges_in_the_same_way():
    with METHODS.temporary():

        @method("ranged", plan=low_rank_plan)
        def ranged(problem: Problem, spec: GroupSpec, *, share: Annotated[float, Field(gt=0, le=1)] = 1.0) -> None:
            """Nothing."""

        with pytest.raises(RecipeError, match="'share' cannot be 0: it must be more than 0 and at most 1"):
            get_method("ranged").check({"share": 0})
    assert range_text([]) == ""
