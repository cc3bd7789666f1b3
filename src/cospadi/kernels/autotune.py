"""Choosing the fastest of a few ways to do the same thing, once per shape, in memory.

The first call of a shape times every candidate on the real tensors and remembers the winner for the process. While a
CUDA graph is captured, or with tuning switched off, the first candidate that is known to run is taken: put the most
reasonable one first. A caller keeps its candidates in a :class:`Way`, so that once a choice is made a call costs the
host one look at it. Before every timing a buffer larger than the second-level cache is filled: that empties the cache
of weights, as the other layers of a model do, and keeps the device busy while the host prepares the launch, which would
otherwise be what is timed.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Run = Callable[..., Tensor]
REPEATS = 5
FILLS = 8  # some 0.2 ms on an H200, longer than a launch takes the host
_enabled = True
_choices: dict[Hashable, str] = {}
_failed: dict[tuple[Hashable, str], str] = {}
ways: dict[Hashable, Run] = {}
"""What callers have made, by keys of their own, to do the same again; :func:`clear` empties it."""


@dataclass(frozen=True)
class Candidate:
    """One way to do it: `name` is the same for the same way from call to call."""

    name: str
    run: Run


class Way:
    """:func:`choose` among the same candidates at every call, until there is a choice; from then on that one."""

    __slots__ = ("_candidates", "_key", "_resort", "_settled")

    def __init__(self, key: Hashable, candidates: Sequence[Candidate], resort: Run | None = None) -> None:
        self._key, self._candidates, self._resort = key, tuple(candidates), resort
        self._settled: Run | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """Do it, with the arguments that all candidates and the resort take."""
        if self._settled is not None:
            return self._settled(*arguments)
        out = choose(self._key, self._candidates, self._resort, arguments)
        # only what was timed is final: without timing, or in a capture, the next call may still choose another
        chosen = _choices.get(self._key)
        self._settled = next((c.run for c in self._candidates if c.name == chosen), None)
        return out


def set_tuning(enabled: bool) -> None:
    """Switch timing of candidates on or off; off, the first candidate is taken."""
    global _enabled
    _enabled = enabled


def choices() -> dict[Hashable, str]:
    """What has been chosen so far, by key (a copy)."""
    return dict(_choices)


def clear() -> None:
    """Forget all choices and failures."""
    ways.clear()
    _choices.clear()
    _failed.clear()


def failures() -> dict[tuple[Hashable, str], str]:
    """Candidates that did not run, by key and name, and why (a copy)."""
    return dict(_failed)


def choose(
    key: Hashable, candidates: Sequence[Candidate], resort: Run | None = None, arguments: Sequence[Any] = ()
) -> Tensor:
    """Run the best candidate. One that does not compile, or asks for more than the device has, is ruled out, aloud.

    Args:
        key: the shape and whatever else the choice depends on.
        candidates: all give the same tensor; the likely best first.
        resort: what to run if none of them does, and only then.
        arguments: for whichever runs.

    Returns:
        the result of the chosen candidate.

    Raises:
        RuntimeError: if every candidate failed and there is no other resort.
        torch.OutOfMemoryError: as it comes.
    """
    chosen = _choices.get(key)
    for candidate in candidates:
        if candidate.name == chosen:
            return candidate.run(*arguments)
    usable = [c for c in candidates if (key, c.name) not in _failed]
    if len(usable) > 1 and _enabled and not torch.cuda.is_current_stream_capturing():
        usable = _ranked(key, usable, arguments)
        if usable:
            _choices[key] = usable[0].name
    for candidate in usable:
        try:
            return candidate.run(*arguments)
        except Exception as error:
            _rule_out(key, candidate, error)
    if resort is not None:
        return resort(*arguments)
    raise RuntimeError("no kernel of this layer runs on this device; see the warnings above")


def _ranked(key: Hashable, candidates: Sequence[Candidate], arguments: Sequence[Any]) -> list[Candidate]:
    timed: list[tuple[float, int, Candidate]] = []
    for candidate in candidates:
        try:
            timed.append((_seconds(partial(candidate.run, *arguments)), len(timed), candidate))
        except Exception as error:
            _rule_out(key, candidate, error)
    return [candidate for _, _, candidate in sorted(timed, key=lambda entry: entry[:2])]


def _rule_out(key: Hashable, candidate: Candidate, error: Exception) -> None:
    """Remember that a candidate does not run.

    Compilers fail in ways of their own, from memory that does not suffice to an assertion, so any error counts, except
    that the device has no memory left, which says nothing about the candidate.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    said = candidate.name in {name for _, name in _failed}
    _failed[key, candidate.name] = str(error)
    if not said:
        logger.warning("kernel %s does not run on this device (%s); using another", candidate.name, error)


def _seconds(run: Run) -> float:
    run()  # compiles and loads
    cache = torch.cuda.get_device_properties().L2_cache_size
    filler = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(FILLS):
            filler.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)
