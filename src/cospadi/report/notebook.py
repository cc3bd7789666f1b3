"""Progress in a notebook: one cell output that is updated in place, without widgets and without scripts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from html import escape
from typing import Any

from cospadi.report.html_parts import html_fragment
from cospadi.report.text import human_seconds

SHELLS = ("ZMQInteractiveShell", "google.colab._shell")
"""Interactive shells that show HTML: Jupyter's by its class, Colab's by its module."""


def in_notebook() -> bool:
    """Whether this code runs in a notebook. Loads nothing: in a notebook, IPython is loaded already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return any(SHELLS[0] == kind.__name__ or SHELLS[1] == kind.__module__ for kind in type(shell).__mro__)


class NotebookDisplay:
    """Shows the progress of a run below the cell; pass :meth:`update` as the progress callback.

    Args:
        every: seconds between two updates of a phase.
        clock: seconds, monotonic.
    """

    def __init__(self, every: float = 0.2, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self._handle: Any = None
        self._phases: dict[str, tuple[int, int, str]] = {}
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._last = float("-inf")

    def update(self, phase: str, done: int, total: int, detail: str = "", error: float | None = None, /) -> None:
        """Report progress; the arguments are those of :class:`cospadi.progress.Progress`."""
        now = self.clock()
        new = phase not in self._phases
        finished = total > 0 and done >= total
        self._began.setdefault(phase, now)
        self._took[phase] = now - self._began[phase]
        self._phases[phase] = (done, total, "" if finished else " ".join(str(detail).split()))
        if new or finished or now - self._last >= self.every:
            self._last = now
            self._show()

    def _show(self) -> None:
        from IPython.display import HTML, display

        page = HTML(self.html())
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

    def html(self) -> str:
        """The phases so far, a line each."""
        rows = []
        for phase, (done, total, detail) in self._phases.items():
            bar = f'<progress value="{done}" max="{total}"></progress>' if total > 0 else "<progress></progress>"
            count = f"{done}/{total}" if total > 0 else str(done)
            took = human_seconds(self._took[phase])
            cells = (escape(phase), bar, count, took, f'<span class="note">{escape(detail)}</span>')
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n")
        return html_fragment("", (), [f"<table>\n{''.join(rows)}</table>\n"])
