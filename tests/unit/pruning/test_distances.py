import math

import pytest
import torch

from cospadi.errors import BudgetError, CalibrationError, NumericalError, RecipeError
from cospadi.model_view import discover_layers
from cospadi.pruning.depth.distances import chosen_run, pair_distances
from cospadi.pruning.evidence import Evidence, Tokens
from tiny import tiny_model, token_ids


def by_hand(states, lengths):
    """Distances from their definition, float64, sequence by sequence and without any padding."""
    depths = len(states)
    cosine, angular, tokens = torch.zeros(depths, depths), torch.zeros(depths, depths), 0
    cosine, angular = cosine.double(), angular.double()
    for row, length in enumerate(lengths):
        tokens += length
        for a in range(depths):
            for b in range(depths):
                x, y = states[a][row, :length].double(), states[b][row, :length].double()
                cos = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
                cosine[a, b] += (1 - cos).sum()
                angular[a, b] += math.acos(min(1.0, float(cos[-1]))) / math.pi if a != b else 0.0
    return cosine / tokens, angular / len(lengths)


def random_states(depths=4, rows=5, length=7, width=6):
    base = torch.randn(rows, length, width)
    return [base + 0.5 * depth * torch.randn(rows, length, width) for depth in range(depths)]


def test_pair_distances_are_those_of_the_definition_without_the_padding():
    states, lengths = random_states(), [7, 3, 1, 6, 7]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    for state in states:
        state[~mask] = 1e6 * torch.randn(int((~mask).sum()), 6)  # what stands in padding must not matter
    batches = [([s[:2] for s in states], mask[:2]), ([s[2:] for s in states], mask[2:])]
    found = pair_distances(batches, len(states))
    cosine, angular = by_hand(states, lengths)
    torch.testing.assert_close(found.cosine, cosine, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.angular, angular, rtol=0, atol=1e-4)
    assert (found.tokens, found.sequences) == (24, 5)
    assert torch.equal(found.cosine.diagonal(), torch.zeros(4, dtype=torch.float64))


def test_distances_do_not_depend_on_padding_of_a_real_model():
    view = discover_layers(tiny_model("mistral", seed=3))
    ids, lengths = token_ids(4, 24, seed=5), torch.tensor([24, 9, 17, 2])
    padded = Evidence(view, Tokens(ids, lengths)).pairs
    parts = [Evidence(view, Tokens(ids[i : i + 1, :n])).pairs for i, n in enumerate(lengths.tolist())]
    cosine = sum(part.cosine * part.tokens for part in parts) / int(lengths.sum())
    angular = sum(part.angular for part in parts) / 4
    torch.testing.assert_close(padded.cosine, cosine, rtol=0, atol=1e-6)
    torch.testing.assert_close(padded.angular, angular, rtol=0, atol=1e-4)
    unmasked = Evidence(view, Tokens(ids)).pairs
    assert (unmasked.cosine - padded.cosine).abs().max() > 1e-4  # the padding would have been seen


def test_damage_is_named_by_its_depth():
    states = random_states(depths=3)
    states[2][1, 2, 0] = float("nan")
    mask = torch.ones(5, 7, dtype=torch.bool)
    with pytest.raises(NumericalError, match="output of block 1"):
        pair_distances([(states, mask)], 3)


def test_the_nearest_run_is_chosen_and_a_start_is_obeyed():
    distances = torch.rand(7, 7, dtype=torch.float64) + 1
    distances[3, 5] = 0.1
    distances[0, 2] = 0.05
    assert chosen_run(distances, 2) == 0
    assert chosen_run(distances, 2, first=1) == 3
    for start in range(1, 5):
        assert chosen_run(distances, 2, start, first=1) == start  # never computed anew
    for start in (0, 5, -1):
        with pytest.raises(RecipeError, match="starts at 1 to 4"):
            chosen_run(distances, 2, start, first=1)
    with pytest.raises(BudgetError, match="keeps the first 1"):
        chosen_run(distances, 6, first=1)


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        (torch.zeros(0, 4, dtype=torch.long), None),
        (torch.zeros(4, dtype=torch.long), None),
        (torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 5])),
        (torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 0])),
        (torch.zeros(2, 4, dtype=torch.long), torch.tensor([4])),
    ],
)
def test_useless_tokens_are_refused(ids, lengths):
    with pytest.raises(CalibrationError):
        Tokens(ids, lengths)
