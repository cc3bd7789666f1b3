"""Choosing among candidates where there is nothing to time: what fails is ruled out, and something is left."""

import pytest
import torch

from cospadi.kernels import autotune as tuning
from cospadi.kernels.autotune import Candidate, choose

ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


def fails(error):
    def run():
        raise error

    return run


@pytest.fixture(autouse=True)
def forget():
    tuning.clear()
    tuning.set_tuning(False)
    yield
    tuning.clear()
    tuning.set_tuning(True)


def test_the_first_that_runs_is_taken_and_the_others_are_named(caplog):
    broken = Candidate("broken", fails(AssertionError("a compiler's own")))
    for _ in range(2):
        assert choose("key", [broken, Candidate("good", lambda: ONE)]) is ONE
    assert caplog.text.count("kernel broken does not run on this device (a compiler's own)") == 1
    assert tuning.failures() == {("key", "broken"): "a compiler's own"}


def test_another_shape_may_still_use_what_failed_for_one():
    broken = Candidate("sometimes", fails(RuntimeError("too large")))
    assert choose("large", [broken, Candidate("good", lambda: ONE)]) is ONE
    assert choose("small", [Candidate("sometimes", lambda: TWO)]) is TWO


def test_the_resort_runs_only_if_nothing_else_does():
    assert choose("key", [Candidate("good", lambda: ONE)], fails(AssertionError())) is ONE
    assert choose("other", [Candidate("broken", fails(ValueError("no")))], lambda: TWO) is TWO
    assert choose("none", [], lambda: TWO) is TWO
    with pytest.raises(RuntimeError, match="no kernel of this layer runs"):
        choose("other", [Candidate("broken", fails(ValueError("no")))])


def test_full_memory_rules_nothing_out():
    with pytest.raises(torch.OutOfMemoryError):
        choose("key", [Candidate("large", fails(torch.OutOfMemoryError("full")))], lambda: TWO)
    assert tuning.failures() == {}
