"""Autotuning: choose the fastest of several kernels that compute the same, once per shape and process.

The first call of a shape times every candidate on the real tensors and remembers the winner. While a CUDA graph is
being captured, or with tuning switched off, the first candidate that runs is used, so put the most promising one first.
A caller keeps its candidates in a :class:`Way`; after the choice a call costs the host one attribute lookup.

Before each timing a buffer larger than the L2 cache is filled. This evicts the weights, as the other layers of a model
would, and keeps the device busy while the host prepares the launch; otherwise the launch would be timed.
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
FILLS = 8  # about 0.2 ms on an H200, longer than the host needs for a launch
_enabled = True
_choices: dict[Hashable, str] = {}
_failed: dict[tuple[Hashable, str], str] = {}
ways: dict[Hashable, Run] = {}
"""Prepared products by the callers' keys, to be used again; :func:`clear` empties it."""


@dataclass(frozen=True)
class Candidate:
    """One implementation. The same implementation has the same `name` at every call."""

    name: str
    run: Run


class Way:
    """Calls :func:`choose` with the same candidates until one has been chosen, and that one from then on."""

    __slots__ = ("_candidates", "_key", "_resort", "_settled")

    def __init__(self, key: Hashable, candidates: Sequence[Candidate], resort: Run | None = None) -> None:
        self._key, self._candidates, self._resort = key, tuple(candidates), resort
        self._settled: Run | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """Run with the arguments that all candidates and the last resort take."""
        if self._settled is not None:
            return self._settled(*arguments)
        out = choose(self._key, self._candidates, self._resort, arguments)
        # only a timed choice is final: without tuning, or during a capture, the next call may choose another
        chosen = _choices.get(self._key)
        self._settled = next((c.run for c in self._candidates if c.name == chosen), None)
        return out


def set_tuning(enabled: bool) -> None:
    """Switch tuning on or off. While it is off, the first candidate that runs is used."""
    global _enabled
    _enabled = enabled


def choices() -> dict[Hashable, str]:
    """The choices so far: names of candidates by key (a copy)."""
    return dict(_choices)


def clear() -> None:
    """Forget all prepared products, choices and failures."""
    ways.clear()
    _choices.clear()
    _failed.clear()


def failures() -> dict[tuple[Hashable, str], str]:
    """The errors of candidates that did not run, by key and name (a copy)."""
    return dict(_failed)


def choose(
    key: Hashable, candidates: Sequence[Candidate], resort: Run | None = None, arguments: Sequence[Any] = ()
) -> Tensor:
    """Run the best candidate. One that does not compile or exceeds the device's limits is ruled out with a warning.

    Args:
        key: the shape and whatever else the choice depends on.
        candidates: all compute the same tensor; the most promising one first.
        resort: the last resort, run only if no candidate runs.
        arguments: of the candidate.

    Returns:
        The result of the chosen candidate.

    Raises:
        RuntimeError: if every candidate failed and there is no last resort.
        torch.OutOfMemoryError: if a candidate raised it.
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
            timed.append((milliseconds(partial(candidate.run, *arguments)), len(timed), candidate))
        except Exception as error:
            _rule_out(key, candidate, error)
    return [candidate for _, _, candidate in sorted(timed, key=lambda entry: entry[:2])]


def _rule_out(key: Hashable, candidate: Candidate, error: Exception) -> None:
    """Remember that a candidate does not run.

    Any error counts, because compilers fail in many ways, from a lack of shared memory to an assertion. The exception
    is a device that is out of memory, which says nothing about the candidate.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    said = candidate.name in {name for _, name in _failed}
    _failed[key, candidate.name] = str(error)
    if not said:
        logger.warning("kernel %s does not run on this device (%s); using another", candidate.name, error)


def milliseconds(run: Run) -> float:
    """Median time of a call on the current CUDA device, in milliseconds, with a cold L2 cache."""
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
