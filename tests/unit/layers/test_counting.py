"""``num_parameters`` counts the weights that a compressed model stands for, not the words that hold them."""

import copy
import io

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from checkpoints.factory import compress_randomly
from cospadi.checkpoint import load, save
from cospadi.checkpoint.formats.factored import FACTORED
from tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Counts of the dense model, the compressed model, and its checkpoint."""
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    counts = {name: call(model) for name, call in COUNTS.items()}
    groups = compress_randomly(model)
    directory = tmp_path_factory.mktemp("c") / "c"
    save(model, byte_tokenizer(), directory, groups)
    return counts, model, directory


COUNTS = {
    "all": lambda model: model.num_parameters(),
    "without embeddings": lambda model: model.num_parameters(exclude_embeddings=True),
    "decoder": lambda model: model.model.num_parameters(),
}


def check(model, counts):
    assert {name: call(model) for name, call in COUNTS.items()} == counts


def test_counts_are_those_of_the_dense_model(pair):
    counts, model, directory = pair
    check(model, counts)
    check(AutoModelForCausalLM.from_pretrained(directory), counts)
    assert AutoModel.from_pretrained(directory).num_parameters() == counts["decoder"]


def test_copies_and_pickles_count_their_own(pair):
    counts, model, _ = pair
    twin = copy.deepcopy(model)
    twin.lm_head = torch.nn.Linear(8, 8, bias=False)
    assert twin.num_parameters() != counts["all"]
    check(model, counts)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    check(again, counts)
    again.lm_head = torch.nn.Linear(8, 8, bias=False)
    assert again.num_parameters() == twin.num_parameters()


def test_dense_again_counts_the_same(pair):
    counts, _, directory = pair
    model = load(directory)
    FACTORED.dense(model)
    check(model, counts)


def test_trainable_parameters_are_counted_as_stored(pair):
    _, _, directory = pair
    model = load(directory)
    model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0
    model.requires_grad_(True)
    floats = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    assert model.num_parameters(only_trainable=True) == floats
    assert not any(p.requires_grad for p in model.parameters() if not p.is_floating_point())
    tokens = torch.arange(12)[None]
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.is_floating_point())
