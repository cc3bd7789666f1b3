"""Reading, merging and refusing recipes."""

import json
import random

import pytest
import yaml

from cospadi.errors import BudgetError, RecipeError
from cospadi.quantities import parse_size
from cospadi.recipe import Recipe, json_schema


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("1.5GiB", 3 * 2**29),
        ("12", 12),
        ("3k", 3000),
        ("2KiB", 2048),
        (" .5 MB ", 500_000),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "five", "5 GB GB", "1e9", "5QB", "0.0MB", "nan"])
def test_what_is_not_a_size(text):
    with pytest.raises(RecipeError, match="not a size"):
        parse_size(text)


def test_written_and_read_back(tmp_path):
    draw = random.Random(5)
    for _ in range(5):
        recipe = Recipe().merged(
            {
                "keep": draw.uniform(0.01, 0.99),
                "seed": draw.randrange(10**6),
                "options": {"rounds": draw.randrange(1, 99), "pattern": "16:32"},
                "calibration": {"source": "täxt file.jsonl", "samples": draw.randrange(1, 500)},
            }
        )
        path = tmp_path / "r.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert Recipe.load(path) == recipe


def test_changes_are_laid_over_section_by_section():
    base = Recipe().merged({"keep": 0.7, "calibration": {"samples": 5, "seq_len": 99}, "options": {"a": 1, "b": 2}})
    changed = base.merged({"calibration": {"samples": 6}, "options": {"b": 3}})
    assert (changed.calibration.samples, changed.calibration.seq_len) == (6, 99)
    assert changed.options == {"a": 1, "b": 3} and changed.keep == 0.7
    assert base.calibration.samples == 5, "recipes never change"


def test_one_budget_takes_the_place_of_the_other():
    by_share, by_size = Recipe().merged({"keep": 0.7}), Recipe().merged({"target_size": "3MB"})
    assert by_share.merged({"target_size": "5GB"}) == Recipe(target_size="5GB")
    assert by_size.merged({"keep": 0.5}) == Recipe(keep=0.5)
    assert by_share.merged({"keep": None}).keep is None
    with pytest.raises(BudgetError, match=r"0\.7.*5GB"):
        Recipe().merged({"keep": 0.7, "target_size": "5GB"})
    with pytest.raises(BudgetError, match="--keep"):
        Recipe().require_budget()
    by_share.require_budget()
    by_size.require_budget()


def test_options_belong_to_their_method():
    base = Recipe().merged({"method": "cospadi", "options": {"rho": 3}})
    assert base.merged({"method": "svd"}).options == {}
    assert base.merged({"method": "cospadi"}).options == {"rho": 3}
    assert base.merged({"method": "rtn", "options": {"bits": 4}}).options == {"bits": 4}


def test_a_number_of_bytes_is_a_size(tmp_path):
    (tmp_path / "r.yaml").write_text("target_size: 5000000\n")
    assert parse_size(str(Recipe.load(tmp_path / "r.yaml").target_size)) == 5_000_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keeep": 1}, "'keeep'.*'keep'"),
        ({"calibration": {"sample": 1}}, r"'calibration\.sample'.*'samples'"),
        ({"refine": {"step": 1}}, r"'refine\.step'.*'steps'"),
        ({"zzzzzz": 1}, "known keys: .*method"),
        ({"target_size": "big"}, "not a size"),
        ({"target_size": True}, "target_size"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed cannot be True: it must be an integer"),
        ({"keep": True}, "keep cannot be True: it must be a number"),
        ({"refine": {"steps": True}}, r"refine\.steps.*integer"),
        ({"calibration": {"seq_len": 1}}, r"calibration\.seq_len"),
        ({"grouping": "none"}, "siblings"),
        ({"keep": "much"}, "keep"),
        ({"options": [1]}, "options"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(RecipeError, match=words):
        Recipe().merged(changes)


@pytest.mark.parametrize("keep", [0, 1, -0.1, 1.0001, float("nan"), float("inf")])
def test_shares_lie_between_0_and_1(keep):
    with pytest.raises(BudgetError, match="between 0 and 1"):
        Recipe().merged({"keep": keep})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"keep: 0.5\n  x: [\n", "line 2"),
        (b"- a\n", "list"),
        (b"\xff\xfe", "cannot be read"),
        (b"just words", "str"),
        (b"? [a]\n: 1\n", "not valid YAML|unknown key"),
        (b"1: 2\n", "unknown key '1'"),
    ],
)
def test_files_with_mistakes(tmp_path, content, words):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_an_empty_file_is_an_empty_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert Recipe.load(tmp_path / "r.yaml") == Recipe()


def test_the_schema_names_every_key():
    properties = json.loads(json_schema())["properties"]
    assert properties.keys() == Recipe.model_fields.keys()
    assert all(value.get("description") or "$ref" in str(value) for value in properties.values())


def test_yaml_of_a_recipe_has_no_empty_keys():
    assert "target_size" not in yaml.safe_load(Recipe(keep=0.5).to_yaml())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keeep": 0.8}, "unknown key 'keeep'; did you mean 'keep'"),
        ({"calibration": {"samples": 0}}, "calibration.samples cannot be 0: it must be at least 1"),
        ({"calibration": {"sample": 1}}, "did you mean 'samples'"),
        ({"grouping": "layers"}, "grouping cannot be 'layers': it must be 'matrix', 'siblings'"),
        ({"seed": "x" * 500}, "seed cannot be 'xxx.{,60}…: it must be an integer"),
        ({"prune": {"keep_blocks": 1}}, "prune.keep_blocks cannot be 1: it must be less than 1"),
    ],
)
def test_a_recipe_made_in_python_says_the_same_in_one_line(fields, words):
    for make in (lambda: Recipe(**fields), lambda: Recipe.model_validate(fields)):
        with pytest.raises(RecipeError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_a_recipe_as_functions_take_it(tmp_path):
    (tmp_path / "r.yaml").write_text("keep: 0.7\n", encoding="utf-8")
    made = Recipe(keep=0.7)
    for given in (made, {"keep": 0.7}, tmp_path / "r.yaml", str(tmp_path / "r.yaml")):
        assert Recipe.of(given) == made
    assert Recipe.of(None) == Recipe()
    with pytest.raises(RecipeError, match="recipe: unknown key 'keeep'"):
        Recipe.of({"keeep": 1})
    with pytest.raises(RecipeError, match="not a float"):
        Recipe.of(0.7)
