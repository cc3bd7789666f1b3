"""What every step of a run shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cospadi.calibration import LossGram, Statistics, StatisticsStore, TokenWeights, averaged, blended
from cospadi.format import GroupSpec, Spec
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
        weights: of the calibration tokens; None: all count alike.
        plain_share: of the plain Gram in those that solves get, the rest being loss-weighted.
    """

    view: ModelView
    store: StatisticsStore
    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    seed: int
    progress: Progress
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    weights: TokenWeights | None = None
    plain_share: float = 1.0

    def statistics(self, modules: Sequence[str], sources: Sequence[LinearGroup]) -> list[Statistics]:
        """What the store has of these layers' inputs, loss-weighted Grams included where solves get them.

        Empty in a run without text.

        Args:
            modules: names of the layers.
            sources: the layers that read the same input: one set for all modules, or one for each.
        """
        if not len(self.ids):
            return []
        wanted = [modules] if len(sources) == 1 else [[name] for name in modules]
        if self.weights is None:
            return [self.store.load(source) for source in sources]
        return [self.store.load(source, names) for source, names in zip(sources, wanted, strict=True)]

    def read(self, source: LinearGroup) -> Statistics:
        """What the store has of an input, with the loss-weighted Grams of all layers that read it."""
        return self.statistics(source.modules, [source])[0]

    def gram(self, modules: Sequence[str], plain: Tensor, loss: Mapping[str, LossGram]) -> Tensor:
        """The Gram that a solve gets, on the device: one for several layers with one input.

        Args:
            modules: names of the layers.
            plain: mean Gram of their input (d, d).
            loss: loss-weighted Grams of these and perhaps other layers.
        """
        weighted = averaged([loss[name] for name in modules if name in loss])
        weighted = None if weighted is None else weighted.to(self.device)
        return blended(plain.to(self.device), weighted, self.plain_share)

    def problem(self, modules: Sequence[str], sources: Sequence[LinearGroup], name: str) -> Problem:
        """What a solve of some linear layers gets, on the device.

        Args:
            modules: names of the layers.
            sources: the layers that read the same input: one set for all modules, or one for each.
            name: of the group; the seed of its random choices derives from it.
        """
        return self.problem_of(modules, self.statistics(modules, sources), name)

    def problem_of(self, modules: Sequence[str], statistics: Sequence[Statistics], name: str) -> Problem:
        """The same from statistics that were read before; without any, a problem without Grams."""
        wanted = [modules] if len(statistics) == 1 else [[module] for module in modules if statistics]
        return Problem(
            name=name,
            weights=tuple(self.view.weight(module).to(self.device).float() for module in modules),
            grams=tuple(
                self.gram(names, item.mean_gram, item.loss) for names, item in zip(wanted, statistics, strict=True)
            ),
            mean_abs=tuple(item.mean_abs.to(self.device) for item in statistics),
            fisher=tuple(self.fisher[module].to(self.device) for module in modules if module in self.fisher),
            seed=derived_seed(self.seed, name),
            dtype=self.dtype,
        )

    def apart(self, problem: Problem, modules: Sequence[str], plain: Tensor, loss: Mapping[str, LossGram]) -> Problem:
        """A problem of layers with one input for specs in which they share nothing: each gets the Gram of its own loss.

        Args:
            problem: of the layers, with one Gram.
            modules: names of the layers.
            plain: mean Gram of the input (d, d).
            loss: loss-weighted Grams of the layers.
        """
        if not loss or len(modules) == 1:
            return problem
        grams = tuple(self.gram([name], plain, loss) for name in modules)
        return replace(problem, grams=grams, mean_abs=problem.mean_abs * len(modules))


def shares_nothing(spec: Spec) -> bool:
    """Whether the layers of a group are solved each by itself: they have no dictionary."""
    return isinstance(spec, GroupSpec) and spec.dictionary is None
