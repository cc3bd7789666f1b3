"""What a recipe leaves open is settled by its method and the device; what it says stays."""

import pytest
import torch

from cospadi.engine.plan.order import suited
from cospadi.recipe import Recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WISHES = {"sequential": True, "gram": "loss", "anchor": True, "anchor_share": 0.25}


def fields(recipe):
    return {key: getattr(recipe, key) for key in WISHES}


def test_auto_takes_further_passes_on_a_gpu_only():
    assert fields(suited(Recipe(keep=0.2), GPU)) == WISHES
    assert fields(suited(Recipe(keep=0.2), CPU)) == dict.fromkeys(WISHES)
    assert fields(suited(Recipe(keep=0.8, options={"bits": 16}), GPU)) == dict.fromkeys(WISHES)


def test_published_methods_are_left_alone():
    for method in ("gptq", "svd_llm", "trellis"):
        recipe = Recipe(keep=0.5, method=method)
        assert fields(suited(recipe, GPU)) == dict.fromkeys(WISHES)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gram": "plain"}, WISHES | {"gram": "plain"}),
        ({"anchor": False}, WISHES | {"anchor": False, "anchor_share": None}),
        ({"anchor_share": 0.5}, WISHES | {"anchor_share": 0.5}),
        ({"sequential": False}, {"sequential": False, "gram": "loss", "anchor": None, "anchor_share": None}),
        ({"grouping": "cross_layer"}, {"sequential": None, "gram": "loss", "anchor": None, "anchor_share": None}),
    ],
)
def test_what_a_recipe_says_stays(given, expected):
    assert fields(suited(Recipe(keep=0.2, **given), GPU)) == expected


def test_options_that_suit_a_device_give_way_to_given_ones():
    assert suited(Recipe(keep=0.2, method="trellis"), CPU).options == {"state": 10}
    assert suited(Recipe(keep=0.2, method="trellis", options={"state": 12}), CPU).options == {"state": 12}
    recipe = Recipe(keep=0.2, method="trellis")
    assert suited(recipe, GPU) is recipe
