"""An interrupt that a library swallows comes back with the next report of progress."""

import io
import signal
import threading

import pytest
from rich.console import Console

from cospadi.interrupt import interrupts_remembered, raise_if_interrupted
from cospadi.report.progress import ProgressDisplay


def swallowed():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_progress_raises_a_swallowed_interrupt_again_once():
    display = ProgressDisplay(Console(file=io.StringIO()))
    with interrupts_remembered():
        display.update("factorise", 0, 3)
        swallowed()
        with pytest.raises(KeyboardInterrupt):
            display.update("factorise", 1, 3)
        display.update("factorise", 2, 3)


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_remembered():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    raise_if_interrupted()
    with interrupts_remembered():
        raise_if_interrupted()


def test_other_threads_may_use_it():
    seen = []

    def work():
        with interrupts_remembered():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
