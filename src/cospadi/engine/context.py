"""What every step of a run shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cospadi.calibration import Statistics, StatisticsStore
from cospadi.methods import Problem
from cospadi.model_view import LinearGroup, ModelView
from cospadi.progress import Progress
from cospadi.runtime.fingerprints import derived_seed


@dataclass(frozen=True)
class RunContext:
    """What every step of a run shares.

    Attributes:
        view: of the real model.
        store: statistics of every layer's input.
        ids: calibration tokens, int64 (sequences, length); none of a run without text.
        device: where to compute.
        dtype: 16-bit float of the stored tensors.
        seed: of the run.
        progress: called as progress(phase, done, total, detail="", error=None).
        fisher: mean squared gradient of every weight by module name, for methods that need it.
    """

    view: ModelView
    store: StatisticsStore
    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    seed: int
    progress: Progress
    fisher: Mapping[str, Tensor] = field(default_factory=dict)

    def problem(self, modules: Sequence[str], sources: Sequence[LinearGroup], name: str) -> Problem:
        """What a solve of some linear layers gets, on the device.

        Args:
            modules: names of the layers.
            sources: the layers that read the same input: one set for all modules, or one for each.
            name: of the group; the seed of its random choices derives from it.
        """
        known = [self.store.load(source) for source in sources] if len(self.ids) else []
        return self.problem_of(modules, known, name)

    def problem_of(self, modules: Sequence[str], statistics: Sequence[Statistics], name: str) -> Problem:
        """The same from statistics that were read before."""
        return Problem(
            name=name,
            weights=tuple(self.view.weight(module).to(self.device).float() for module in modules),
            grams=tuple(item.mean_gram.to(self.device) for item in statistics),
            mean_abs=tuple(item.mean_abs.to(self.device) for item in statistics),
            fisher=tuple(self.fisher[module].to(self.device) for module in modules if module in self.fisher),
            seed=derived_seed(self.seed, name),
            dtype=self.dtype,
        )
