"""How a long run reports where it is: two callback types and three helpers."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the events of a run; :meth:`cospadi.report.ProgressDisplay.update` is one."""

    def __call__(self, phase: str, done: int, total: int, detail: str = "", error: float | None = None, /) -> None:
        """Report an event.

        Args:
            phase: what the run is doing: ``read``, ``calibrate``, ``plan``, ``factorise``, ``save``, ``evaluate`` …
            done: steps of the phase finished so far.
            total: steps of the phase; 0 if unknown.
            detail: what is being worked on, such as a layer's name.
            error: relative squared error so far; None where there is none.
        """


class PhaseProgress(Protocol):
    """Receives the events of one phase: ``partial(progress, "calibrate")`` is one."""

    def __call__(self, done: int, total: int, detail: str = "", /) -> None:
        """Report an event; the arguments are those of :class:`Progress`."""


def silent(phase: str, done: int, total: int, detail: str = "", error: float | None = None, /) -> None:
    """A :class:`Progress` that reports nothing."""


def labelled(progress: Progress, label: str) -> Progress:
    """A :class:`Progress` that puts a label in front of every detail, to tell the runs of a series apart."""

    def report(phase: str, done: int, total: int, detail: str = "", error: float | None = None, /) -> None:
        progress(phase, done, total, f"{label}: {detail}" if detail else label, error)

    return report
