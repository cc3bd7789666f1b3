"""Ctrl-C that no library swallows.

Python raises `KeyboardInterrupt` wherever the main thread happens to be, which may be inside an import or a callback
of a library that catches everything. The run would go on as if nothing had happened. So the signal is remembered, and
the next report of progress raises it again.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pending = False


@contextmanager
def interrupts_remembered() -> Iterator[None]:
    """Remember interrupts while this lasts; nothing happens outside the main thread, which alone gets signals."""
    global _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _remember)
    _pending = False
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _pending = False


def raise_if_interrupted() -> None:
    """Raise an interrupt again that somebody swallowed.

    Raises:
        KeyboardInterrupt: once for every remembered one.
    """
    global _pending
    if _pending:
        _pending = False
        raise KeyboardInterrupt


def _remember(_signal: int, _frame: FrameType | None) -> None:
    global _pending
    _pending = True
    raise KeyboardInterrupt
