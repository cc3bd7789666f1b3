"""What replaceme chooses by: held-out loss or error, plain removal always among the choices."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from cospadi.errors import BudgetError, NumericalError
from cospadi.model_view import discover_layers
from cospadi.pruning import Evidence, Tokens, get_pruning_method
from cospadi.pruning.depth.replaceme.rows import place, stream_rows
from cospadi.pruning.depth.replaceme.trials import CorrectionTrial, best, cheapest, solutions, tried
from cospadi.pruning.depth.surgery import Cut
from tiny import token_ids
from unit.pruning.models import deep_model, logits


def evidence(model, sequences=16, length=24, lengths=None):
    return Evidence(discover_layers(model), Tokens(token_ids(sequences, length, seed=9), lengths))


def remove(found, blocks, **options):
    return get_pruning_method("replaceme").remove(found, blocks, options)


def loss(model, ids):
    out = logits(model, ids)
    return float(functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def pruned(model, cut):
    return cut.apply(discover_layers(copy.deepcopy(model)))


def predicting(blocks=6):
    """A model whose head has learnt the calibration text, from the first half of the hidden state only.

    Its last block writes large values into the other half: far by every distance, and without effect on predictions.
    """
    model = deep_model(blocks=blocks, tie_word_embeddings=False)
    last = model.model.layers[-1]
    with torch.no_grad():
        for matrix in (last.self_attn.o_proj.weight, last.mlp.down_proj.weight):
            matrix[:12] = 0
            matrix[12:] *= 20
        ids = token_ids(16, 24, seed=9)
        seen = []
        handle = model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        logits(model, ids)
        handle.remove()
        states = seen[0][:, :-1, :12].flatten(0, 1).double()
        head = torch.zeros(257, 12, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([head], max_iter=60)

        def closure():
            optimiser.zero_grad()
            price = functional.cross_entropy(states @ head.T, ids[:, 1:].flatten())
            price.backward()
            return price

        with torch.enable_grad():
            optimiser.step(closure)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :12] = head.detach().float()
    return model


def test_the_run_of_least_held_out_loss_goes_and_not_the_nearest():
    model = predicting()
    found = evidence(model)
    cut = remove(found, 1)
    told = cut.facts()
    trials = {tuple(trial["run"]): trial for trial in told["trials"]}
    assert len(trials) == 5 and told["measure"].startswith("held-out loss")
    nearest = remove(found, 1, select="cosine")
    assert nearest.removed != cut.removed == (5,)
    assert (*cut.removed, cut.removed[0] + 1) == min(trials, key=lambda run: trials[run]["loss"])
    # what a trial says is what the model, fitted and cut like that, does on the sequences between
    fitted, held = found.tokens.parted(2)
    for run, trial in trials.items():
        half = Evidence(found.view, fitted)
        same = remove(half, 1, start=run[0], ridge=trial["ridge"]) if trial["corrected"] else Cut(run[:1])
        assert loss(pruned(model, same), held.ids) == pytest.approx(trial["loss"], abs=1e-4)


@pytest.mark.parametrize(("fold", "structure"), [("down", "full"), ("transform", "full"), ("transform", "orthonormal")])
def test_the_run_of_least_error_is_another_choice(fold, structure):
    found = evidence(predicting())
    cut = remove(found, 1, select="error", fold=fold, structure=structure)
    trials = cut.facts()["trials"]
    chosen = min(trials, key=lambda trial: trial["error"])
    assert cut.removed == (chosen["run"][0],) and cut.removed != (5,)
    assert all(trial["loss"] is None for trial in trials)
    # the error is that of the hidden states after the run, on the sequences that the fit has not seen
    fitted, held = found.tokens.parted(2)
    for trial in trials:
        where = place(found, tuple(trial["run"]), fold, separate=False)
        rows = stream_rows(found, where, {}, fitted, relative=True)
        options = solutions(rows, where, structure, 1, None, held_out=True)
        other = stream_rows(found, where, {}, held, relative=True).equations
        errors = []
        for option in options:
            nothing = torch.zeros_like(other.cross) if fold == "down" else torch.eye(24, dtype=torch.float64)
            errors.append(other.loss(nothing if option.step is None else nothing + option.step))
        assert trial["error"] == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"fold": "down"}, {"structure": "full"}, {"solver": "cosine", "learning_rate": 0.5}]
)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_result_is_never_worse_on_held_out_text_than_plain_removal(blocks, options):
    for model in (predicting(), deep_model(blocks=6, seed=blocks)):
        found = evidence(model)
        cut = remove(found, blocks, **options)
        _, held = found.tokens.parted(8)
        plain, ours = loss(pruned(model, Cut(cut.removed)), held.ids), loss(pruned(model, cut), held.ids)
        told = cut.facts()["transforms"][0]
        assert ours <= plain + 1e-5
        assert ours == pytest.approx(min(trial["loss"] for trial in told["held_out"]), abs=1e-4)
        assert told["corrected"] == bool(cut.weights)


def test_a_correction_that_harms_is_left_out():
    # Text without any order: the head, random, minds every change, and least squares learns noise from few tokens.
    left_out = 0
    for seed in range(6):
        found = evidence(deep_model(seed=seed), sequences=8, length=6)
        with pytest.warns(UserWarning, match="fewer than"):
            cut = remove(found, 1, fold="down")
        told = cut.facts()["transforms"][0]
        left_out += not told["corrected"]
        assert told["corrected"] or (told["error"] == 1.0 and not cut.weights and told["ridge"] is None)
    assert left_out


def test_held_out_sequences_are_not_fitted_to():
    model = deep_model()
    found = evidence(model)
    cut = remove(found, 2, start=2, fold="down")
    told = cut.facts()["transforms"][0]
    fitted, held = found.tokens.parted(8)
    assert len(held.ids) == 2 and len(fitted.ids) == 14
    if told["corrected"]:
        same = remove(Evidence(found.view, fitted), 2, start=2, fold="down", ridge=told["ridge"])
        for name, weight in cut.weights.items():
            torch.testing.assert_close(same.weights[name], weight)


def test_parts_share_nothing_and_a_lone_sequence_is_both():
    ids = torch.arange(70).reshape(10, 7)
    tokens = Tokens(ids, torch.arange(1, 11).clamp_max(7))
    for every, places in ((2, [1, 3, 5, 7, 9]), (8, [7]), (20, [9])):
        fitted, held = tokens.parted(every)
        assert torch.equal(held.ids, ids[places]) and torch.equal(held.lengths, tokens.lengths[places])
        assert fitted.count + held.count == tokens.count and len(fitted.ids) + len(held.ids) == 10
    lone = tokens.first(1)
    assert lone.parted(8) == (lone, lone)


def test_more_text_needs_less_ridge():
    def chosen(sequences):
        found = evidence(deep_model(), sequences=sequences, length=12)
        told = remove(found, 1, start=2, select="error", fold="down").facts()["transforms"][0]
        return told["ridge"] if told["corrected"] else float("inf")

    assert chosen(512) < chosen(8)


def test_the_nearest_runs_come_first():
    distances = torch.rand(7, 7, generator=torch.Generator().manual_seed(3))
    for blocks in (1, 2, 5):
        runs = cheapest(distances, blocks, 99, first=1)
        assert sorted(runs) == [(start, start + blocks) for start in range(1, 7 - blocks)]
        assert all(float(distances[a]) <= float(distances[b]) for a, b in pairwise(runs))
        assert cheapest(distances, blocks, 2, first=1) == runs[:2]
    with pytest.raises(BudgetError, match="keeps the first 1"):
        cheapest(distances, 6, 1, first=1)


def test_a_smaller_gain_takes_a_larger_ridge():
    prices = [10.0, 6.0, 4.0, 2.0, 3.0]
    trials = [CorrectionTrial((1, 2), None, bool(price < 10), 0.0, price) for price in prices]
    assert [best(trials, "loss", gain) for gain in (1.0, 0.99, 0.75, 0.5, 0.1)] == [3, 3, 2, 1, 1]
    assert best([CorrectionTrial((1, 2), None, False, 0.0, 1.0), trials[1]], "loss", 0.5) == 0  # nothing is gained
    found = evidence(predicting())
    cuts = [remove(found, 1, start=2, structure="full", gain=gain) for gain in (1.0, 0.3)]
    ridges = [cut.facts()["transforms"][0]["ridge"] for cut in cuts]
    assert None not in ridges and ridges[1] >= ridges[0]


def test_nan_never_wins_and_nothing_finite_is_refused():
    trials = [CorrectionTrial((1, 2), None, False, 1.0, float("nan")), CorrectionTrial((1, 2), 0.1, True, 2.0, 3.0)]
    assert best(trials, "loss") == 1 and best(trials, "error") == 0
    model = deep_model()
    found = evidence(model)
    where = place(found, (2, 3), "down", separate=False)
    broken = where.corrected(torch.full((44, 24), float("nan")), 0.1)
    measured = tried(found, [where, broken], {}, found.tokens, relative=True, losses="all")
    assert best(measured, "loss") == best(measured, "error") == 0
    with pytest.raises(NumericalError, match="NaN or Inf"):
        tried(found, [broken], {}, found.tokens, relative=True, losses="all")
