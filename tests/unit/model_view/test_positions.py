"""Sequences longer than a model's positions: an error where these are learned, else a warning."""

import warnings

import pytest

from cospadi.errors import CalibrationError
from cospadi.model_view import check_length, skeleton
from tiny import ARCHITECTURES, tiny_config


def model(architecture, **overrides):
    return skeleton(tiny_config(architecture, **overrides))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3_text", "phi3", "gpt_neox", "opt", "gpt2", "bloom"])
def test_as_many_tokens_as_positions_are_right(architecture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(model(architecture), 128)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3_text", "phi3", "gpt_neox"])
def test_one_more_is_a_warning_where_positions_are_computed(architecture):
    with pytest.warns(UserWarning, match=r"129 tokens are longer than the 128 positions .*--seq-len 128"):
        check_length(model(architecture), 129)


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_one_more_is_an_error_where_positions_are_learned(architecture):
    with pytest.raises(CalibrationError, match=r"129 tokens .* has 128 learned positions: use --seq-len 128 or less"):
        check_length(model(architecture), 129)


def test_a_vocabulary_as_large_as_the_positions_is_no_table_of_positions():
    with pytest.warns(UserWarning, match="257 positions"):
        check_length(model("llama", max_position_embeddings=257), 300)


def test_models_without_a_limit_have_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(model("bloom", max_position_embeddings=None), 1_000_000)
