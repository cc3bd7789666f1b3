"""Progress where a function is called: in a notebook, on a terminal, in a log; and what `progress` may be."""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest

from cospadi.errors import RecipeError
from cospadi.report import progress
from cospadi.report.notebook import NotebookDisplay, in_notebook


class ZMQInteractiveShell:
    """Named as Jupyter's."""


class TerminalInteractiveShell:
    """Named as IPython's on a terminal."""


@pytest.fixture
def pages(monkeypatch):
    """What a notebook would show below the cell, the newest last; its shell can be exchanged."""
    shown: list[str] = []

    def display(page, display_id):
        assert display_id
        shown.append(page.data)
        return SimpleNamespace(update=lambda page: shown.append(page.data))

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: ipython.shell
    ipython.shell = ZMQInteractiveShell()
    module.HTML, module.display = lambda text: SimpleNamespace(data=text), display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return SimpleNamespace(shown=shown, ipython=ipython)


def test_a_notebook_is_told_from_everything_else(pages, monkeypatch):
    assert in_notebook()
    pages.ipython.shell = TerminalInteractiveShell()
    assert not in_notebook()
    pages.ipython.shell = type("Shell", (), {"__module__": "google.colab._shell"})()
    assert in_notebook()
    pages.ipython.shell = None
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook() and "IPython" not in sys.modules


def test_a_notebook_shows_one_output_that_grows(pages):
    clock = iter(range(100))
    display = NotebookDisplay(every=0.0, clock=lambda: next(clock))
    display.update("calibrate", 0, 2, "<layer>")
    display.update("calibrate", 2, 2, "gone when finished")
    display.update("factorise", 1, 0, "layer 3")
    first, second, last = pages.shown
    assert "&lt;layer&gt;" in first and '<progress value="0" max="2">' in first
    assert "gone when finished" not in second and '<progress value="2" max="2">' in second
    assert last.index("calibrate") < last.index("factorise") and "<progress></progress>" in last
    assert "<script" not in last and "http" not in last


def test_quick_events_are_shown_together(pages):
    display = NotebookDisplay(every=10.0, clock=lambda: 0.0)
    for done in range(1000):
        display.update("factorise", done, 1000)
    assert len(pages.shown) == 1
    display.update("factorise", 1000, 1000)
    assert "1000/1000" in pages.shown[-1]


def test_a_notebook_has_its_progress_by_default(pages):
    with progress.showing("auto") as report:
        report("calibrate", 1, 2)
    assert len(pages.shown) == 1
    for off in (False, None):
        with progress.showing(off) as report:
            report("calibrate", 2, 2)
    assert len(pages.shown) == 1


@pytest.mark.parametrize(("wanted", "terminal", "expected"), [
    ("auto", True, "calibrate"), ("auto", False, ""), (True, False, "calibrate"), (False, True, ""), (None, True, ""),
])  # fmt: skip
def test_a_terminal_shows_a_bar_and_a_log_nothing(monkeypatch, wanted, terminal, expected):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with progress.showing(wanted) as report:
        report("calibrate", 1, 2, "layers.0")
    assert (expected in stream.getvalue()) if expected else stream.getvalue() == ""


def test_a_function_is_called_as_it_is():
    seen = []

    def mine(*event):
        seen.append(event)

    with progress.showing(mine) as report:
        report("save", 1, 1)
    assert report is mine and seen == [("save", 1, 1)]
    for wrong in ("loud", 3):
        with pytest.raises(RecipeError, match="progress must be"), progress.showing(wrong):
            pass
