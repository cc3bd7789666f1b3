"""Adam on stored factors: finds its learning rate by short runs, keeps what is best on sequences never trained on.

What is tuned and towards what, is the problem's: one decoder layer's output (`refine`), or the predictions of the whole
model (`predictions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cospadi.engine.tune.tunable import Knob

RATE_FACTOR = 3.0
MOST_FACTORS = 3
EVALUATIONS = 10
WARM_UP = 0.05


class Problem(Protocol):
    """Something to tune."""

    @property
    def knobs(self) -> Sequence[Knob]:
        """What is tuned."""

    def backward(self, chosen: Tensor) -> None:
        """Add the gradients of the mean error of some sequences (their numbers) to the knobs."""

    def error(self, chosen: Tensor) -> float:
        """Mean error of some sequences, as what would be stored has it; called without gradients."""


@dataclass(frozen=True)
class Schedule:
    """How long to tune.

    Attributes:
        steps: Adam steps, once the learning rate is found.
        batch: sequences in a step.
        probe: share of the steps spent on every learning rate that is tried.
        patience: tenths of a run without improvement after which it ends.
        first_rate: the learning rate that is tried first, as a share of each tensor's typical size.
    """

    steps: int
    batch: int
    probe: float
    patience: int
    first_rate: float


def split_sequences(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the sequences to train on, and of those that decide: none of these where there is but one.

    Args:
        count: of all sequences.
        held_out: share of them that decides; one at least.
        seed: of the split.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(held_out * count)), count - 1) if count > 1 else 0
    return order[held:].sort().values, order[:held].sort().values


class Tuner:
    """Tunes a problem; its knobs are left as they were best on the held-out sequences.

    Args:
        problem: what to tune.
        trained: numbers of the sequences to train on.
        held_out: numbers of those that decide.
        schedule: how long.
        seed: of the order of sequences.
        watch: called with steps done, steps in all, and the least held-out error so far.
    """

    def __init__(
        self,
        problem: Problem,
        trained: Tensor,
        held_out: Tensor,
        schedule: Schedule,
        seed: int,
        watch: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.problem, self.trained, self.held_out = problem, trained, held_out
        self.schedule, self.seed, self.watch = schedule, seed, watch
        self.batch = max(1, min(schedule.batch, len(trained)))
        self.knobs = problem.knobs
        self.start = self.best_state = self._state()
        self.before = self.best = math.inf
        self.steps = 0

    def tune(self) -> dict[str, Any]:
        """Everything.

        Returns:
            ``held_out_before``, ``held_out_after`` (absent where nothing was held out), ``rate`` (None: no learning
            rate helped), ``steps``.
        """
        rate = None
        if len(self.held_out):
            self.before = self._evaluate()
            rate = self._find_rate()
            if rate is not None:
                self._run(rate, self.schedule.steps)
            self._restore(self.best_state)
        found = {"held_out_before": self.before, "held_out_after": self.best} if math.isfinite(self.best) else {}
        return found | {"rate": rate, "steps": self.steps}

    def _find_rate(self) -> float | None:
        """The best of a ladder of learning rates by short runs, each from the start; None if all make it worse."""
        first, steps = self.schedule.first_rate, self.schedule.steps
        length = min(steps, max(EVALUATIONS, round(steps * self.schedule.probe)))
        found = {0: self._run(first, length)}
        for direction in (1, -1):
            power = direction
            while abs(power) <= MOST_FACTORS:
                found[power] = self._run(first * RATE_FACTOR**power, length)
                if not found[power] < found[power - direction]:
                    break
                power += direction
            if found[direction] < found[0]:
                break
        power = min(found, key=lambda key: found[key])
        return first * RATE_FACTOR**power if found[power] < self.before else None

    def _run(self, rate: float, steps: int) -> float:
        """Tune from the start, the learning rate falling as a cosine.

        Returns:
            the least held-out error seen after a step.
        """
        self._restore(self.start)
        knobs = [k for k in self.knobs if k.unit > 0]
        optimiser = torch.optim.Adam([{"params": [k.tensor], "lr": rate * k.unit} for k in knobs], betas=(0.9, 0.95))
        warm = max(1, round(WARM_UP * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda t: min(1.0, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, t / steps)))
        )
        every = max(1, -(-steps // EVALUATIONS))
        least, since = math.inf, 0
        for number, chosen in zip(range(1, steps + 1), self._order(), strict=False):
            optimiser.zero_grad(set_to_none=True)
            self.problem.backward(chosen)
            optimiser.step()
            schedule.step()
            self.steps += 1
            if number % every and number != steps:
                continue
            error = self._evaluate()
            since = 0 if error < least else since + 1
            least = min(least, error)
            if self.watch:
                self.watch(number, steps, self.best)
            if not math.isfinite(error) or since > self.schedule.patience:
                break
        return least

    def _order(self) -> Iterator[Tensor]:
        """Sequences to train on, batch by batch, without end; the same in every run."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            shuffled = self.trained[torch.randperm(len(self.trained), generator=generator)]
            yield from (part for part in torch.split(shuffled, self.batch) if len(part) == self.batch)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Error on the held-out sequences; remembers the parameters if they are the best so far."""
        parts = torch.split(self.held_out, self.batch)
        error = sum(self.problem.error(part) * len(part) for part in parts) / len(self.held_out)
        if error < self.best:
            self.best, self.best_state = error, self._state()
        return error

    def _state(self) -> list[Tensor]:
        return [k.tensor.detach().clone() for k in self.knobs]

    @torch.no_grad()
    def _restore(self, state: Sequence[Tensor]) -> None:
        for k, tensor in zip(self.knobs, state, strict=True):
            k.tensor.copy_(tensor)
