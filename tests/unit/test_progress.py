from functools import partial

from cospadi.progress import PhaseProgress, Progress, labelled, silent


def test_labels_tell_the_runs_of_a_series_apart():
    seen = []
    report = labelled(lambda *event: seen.append(event), "svd 0.4")
    report("calibrate", 1, 8, "layers.0")
    report("save", 1, 1)
    report("factorise", 2, 8, "layers.1", 0.25)
    assert seen == [
        ("calibrate", 1, 8, "svd 0.4: layers.0", None),
        ("save", 1, 1, "svd 0.4", None),
        ("factorise", 2, 8, "svd 0.4: layers.1", 0.25),
    ]


def test_labels_nest_and_phases_may_be_fixed():
    seen = []
    progress: Progress = labelled(labelled(lambda *event: seen.append(event), "outer"), "inner")
    steps: PhaseProgress = partial(progress, "evaluate")
    steps(1, 2)
    assert seen == [("evaluate", 1, 2, "outer: inner", None)]


def test_silence_takes_every_event():
    assert silent("read", 0, 1) is None
    assert silent("factorise", 1, 2, "layer", 0.1) is None
