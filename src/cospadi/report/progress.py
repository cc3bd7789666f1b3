"""Progress of a long run: a bar on a terminal or in a notebook, occasional plain lines in a log; always on stderr."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from cospadi.errors import RecipeError
from cospadi.progress import Progress as Callback
from cospadi.progress import silent
from cospadi.report.notebook import NotebookDisplay, in_notebook
from cospadi.report.text import error_text, human_seconds, percent

ProgressOption = Callback | bool | Literal["auto"] | None
"""How a function shows its progress; see :func:`showing`."""


@contextmanager
def showing(progress: ProgressOption) -> Iterator[Callback]:
    """The callback for what a user asked for.

    Args:
        progress: ``"auto"``: a bar on a terminal or in a notebook, nothing elsewhere; True: also plain lines elsewhere;
            False or None: nothing; or a callback.

    Raises:
        RecipeError: if it is none of these.
    """
    if callable(progress):
        yield progress
    elif progress not in ("auto", True, False, None):
        raise RecipeError(f"progress must be 'auto', True, False or a function, not {progress!r}")
    elif progress and in_notebook():
        yield NotebookDisplay().update
    elif progress is True or (progress == "auto" and _on_terminal()):
        with ProgressDisplay() as display:
            yield display.update
    else:
        yield silent


def _on_terminal() -> bool:
    """Whether stderr is a terminal that can draw a bar."""
    console = Console(stderr=True)
    return bool(getattr(sys.stderr, "isatty", lambda: False)()) and console.is_terminal and not console.is_dumb_terminal


class _Field(ProgressColumn):
    """A text field of the task, cut to fit, never wrapped, never interpreted as markup."""

    def __init__(self, key: str, column: Column, style: str = "") -> None:
        super().__init__(column)
        self.key, self.style = key, style

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self.key, "")), style=self.style, no_wrap=True, overflow="ellipsis")


class _Ending(ProgressColumn):
    """The label of the time to its right."""

    def render(self, task: Task) -> Text:
        return Text("took" if task.finished else "left", style="dim")


class ProgressDisplay:
    """Shows the progress of a run; use it as a context manager and pass `update` as the progress callback.

    On a terminal: one bar with the phase, the current layer, the error so far and the time left. Elsewhere: a line
    when a phase begins and ends, and in between every `every` seconds, or after every tenth of the phase if at least a
    second has passed.

    Args:
        console: where to draw; stderr by default, so that stdout holds only results.
        every: seconds between plain lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self, console: Console | None = None, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self.every = every
        self.clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase: str | None = None
        self._began = (0.0, 0)
        self._last_line = (0.0, 0)

    def __enter__(self) -> "ProgressDisplay":
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._progress = Progress(
                _Field("phase", Column(min_width=10), "bold"),
                BarColumn(bar_width=14),
                MofNCompleteColumn(),
                _Field("detail", Column(ratio=1, no_wrap=True), "cyan"),
                _Field("error", Column(no_wrap=True)),
                _Ending(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self.console,
                expand=True,
                redirect_stdout=False,  # would send results to stderr
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def update(self, phase: str, done: int, total: int, detail: str = "", error: float | None = None) -> None:
        """Report progress.

        Args:
            phase: ``calibrate``, ``factorise`` …; a new name starts a new bar.
            done: finished steps.
            total: steps of the phase; 0 or less if unknown.
            detail: the current item, such as a layer's name.
            error: relative error so far; None or NaN if there is none.
        """
        detail = " ".join(str(detail).split())
        shown = f"error {error_text(error)}" if error is not None and math.isfinite(error) else ""
        new = phase != self._phase
        if new:
            self._phase, self._began = phase, (self.clock(), done)
        if self._progress is None:
            self._line(new, done, total, detail, shown)
        else:
            self._bar(self._progress, new, done, total, detail, shown)

    def _bar(self, progress: Progress, new: bool, done: int, total: int, detail: str, shown: str) -> None:
        length = total if total > 0 else None
        if new or self._task is None:
            if self._task is not None:
                progress.stop_task(self._task)
                progress.update(self._task, detail="")
            self._task = progress.add_task(
                "", total=length, completed=done, phase=self._phase, detail=detail, error=shown
            )
        else:
            progress.update(self._task, total=length, completed=done, detail=detail, error=shown)

    def _line(self, new: bool, done: int, total: int, detail: str, shown: str) -> None:
        now = self.clock()
        tenth = 10 * done // total if total > 0 else 0
        when, before = self._last_line
        finished = total > 0 and done >= total
        due = now - when >= self.every or (tenth > before and now - when >= 1.0)
        if not (new or due or (finished and before < 10)):
            return
        self._last_line = (now, tenth)
        began, first = self._began
        parts = [f"{self._phase}:"]
        parts.append(f"{percent(done / total).split('.')[0]}%" if total > 0 else "")
        parts.append(f"{done}/{total}" if total > 0 else str(done))
        parts += [detail, shown]
        if finished and not new:
            parts.append(f"took {human_seconds(now - began)}")
        elif done > first and total > 0:
            parts.append(f"left {human_seconds((now - began) / (done - first) * (total - done))}")
        line = "  ".join(part for part in parts if part)
        # one line, however long: logs are searched by line
        self.console.print(Text(line), soft_wrap=True)
