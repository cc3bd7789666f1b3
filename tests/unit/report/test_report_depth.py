"""What the pages of a pruned model say of its cut."""

from io import StringIO

from rich.console import Console

from cospadi.report.depth import depth_card, depth_page, print_prune, run_rows, trial_rows


def report(**cut):
    run = {"removed": [2, 3], "into": "model.layers.1.mlp.down_proj", "error": 0.25, "corrected": True} | cut
    trials = [
        {"run": [2, 4], "ridge": 0.01, "corrected": True, "error": 0.125, "loss": 3.25},
        {"run": [1, 3], "ridge": None, "corrected": False, "error": 0.5, "loss": None},
        {"run": [3, 5], "ridge": None, "corrected": True, "error": 0.25, "loss": 4.0},
    ]
    prune = {"removed": [2, 3], "runs": [[2, 4]], "transforms": [run], "trials": trials}
    return {
        "model": "m",
        "method": "replaceme",
        "stock": True,
        "prune": prune,
        "distances": {"cosine": [[0.0] * 6] * 6},
    }


def printed(told):
    console = Console(file=StringIO(), width=200)
    print_prune(told, console)
    return console.file.getvalue()


def test_a_correction_is_told_with_its_place_and_error():
    assert run_rows(report()) == [["2-3", "model.layers.1.mlp.down_proj", "0.0000", "25.00%"]]
    assert "replaced by model.layers.1.mlp.down_proj, error 25.00%" in printed(report())
    separate = run_rows(report(into=None))
    assert separate[0][1] == "a linear block"


def test_a_cut_without_a_correction_claims_none():
    told = report(corrected=False, error=1.0)
    assert run_rows(told)[0][1:] == ["nothing", "0.0000", "–"]
    assert "removed without correction" in printed(told) and "replaced by" not in printed(told)
    told["prune"] |= {"transforms": [], "trials": []}  # a method that corrects nothing says nothing of it
    assert run_rows(told)[0][1] == "nothing" and "correction" not in printed(told)
    assert "Runs that were tried" not in depth_page(told)


def test_the_runs_that_were_tried_are_shown():
    rows = trial_rows(report())
    assert rows == [
        ["2-3", "0.01", "0.125", "3.2500"],
        ["1-2", "no correction", "0.5", "–"],
        ["3-4", "–", "0.25", "4.0000"],
    ]
    page = depth_page(report())
    assert "Runs that were tried" in page and "no correction" in page and "3.2500" in page
    assert "2-3" in depth_card(report(), picture=False)
