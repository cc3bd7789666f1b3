"""Layer by layer with feedback: each decoder layer is fitted to what the compressed layers before it really give.

Two things may follow from that, each by itself or both: the *anchored* objective, which gives a method another target
and another Gram (`streams.anchored_target`), and *refinement* (`refine`). Layers must be worked on in order; what is
durable is a finished layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration import StatisticsStore
from cospadi.engine.factorise import measure, rebuild, solve
from cospadi.engine.journal import Journal
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.engine.tune.block import block_error, refine_layer
from cospadi.engine.tune.distill import refine_predictions
from cospadi.engine.tune.streams import Moments, Streams, anchored_error, anchored_target
from cospadi.errors import RecipeError
from cospadi.methods import Problem, get_method
from cospadi.model_view import LinearGroup, ModelView
from cospadi.progress import Progress
from cospadi.recipe import Recipe
from cospadi.runtime.fingerprints import derived_seed

# Measured on the embedded model: the full correction gives the least error of every layer's output, but with a good
# solver half of it gives the lower perplexity (a weak one, a plain low rank, gains from all of it).
ANCHOR_RIDGE = 1e-2
ANCHOR_BLEND = 0.5


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        groups: numbers of every group, in the order of the plan.
        layers: numbers of every decoder layer.
        predictions: numbers of the refinement towards the predictions, if there was one.
        resumed: groups taken over from an interrupted run.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, Any] = field(default_factory=dict)
    resumed: int = 0


@dataclass
class _Layer:
    """A decoder layer while it is worked on: its groups by index in the plan, and what was found for them."""

    index: int
    planned: dict[int, PlannedGroup]
    packed: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    infos: dict[int, dict[str, Any]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def require_layers(plan: Plan) -> None:
    """Check that a plan can be worked on layer by layer.

    Raises:
        RecipeError: if a group spans several decoder layers.
    """
    for group in plan.groups:
        if not set(group.spec.modules) <= set(group.source.modules):
            raise RecipeError(
                f"anchor and refine work layer by layer, and {group.spec.name} of method {group.spec.method!r} spans "
                "several: leave them out, or choose another grouping"
            )


class LayerByLayer:
    """Factorise a whole model in order.

    The model ends up with the weights that the packed tensors stand for, and with tuned norms and biases.

    Args:
        view: of the real model.
        plan: what will be stored.
        recipe: `anchor`, `refine`, `seed`.
        store: statistics of the original model.
        ids: the calibration text (sequences, length).
        device: where to compute.
        journal: one entry for every group, and after all groups of the plan one for every layer, which says that the
            layer is finished and holds its norms and biases.
        dtype: 16-bit float of the stored tensors.
        progress: called as progress(phase, done, total, detail, error).
        fisher: mean squared gradient of every weight by name, for methods that need it.
    """

    def __init__(
        self,
        view: ModelView,
        plan: Plan,
        recipe: Recipe,
        store: StatisticsStore,
        ids: Tensor,
        device: torch.device,
        journal: Journal,
        dtype: torch.dtype,
        progress: Progress,
        fisher: Mapping[str, Tensor] | None = None,
    ) -> None:
        require_layers(plan)
        self.fisher = fisher or {}
        self.view, self.plan, self.recipe, self.store, self.ids = view, plan, recipe, store, ids
        self.device, self.journal, self.dtype, self.progress = device, journal, dtype, progress
        self.originals: dict[int, tuple[Tensor, ...]] = {}

    def go(self) -> Outcome:
        """Work on all layers, or on those that an interrupted run left."""
        outcome = Outcome(groups=[{} for _ in self.plan.groups])
        count = len(self.view.layers)
        unfinished = [index for index in range(count) if not self.journal.has(self._entry(index))]
        refine = self.recipe.refine
        predictions = refine is not None and refine.output_steps > 0
        # what the original layers make of the text is known only as long as it has been followed through all of them
        pending = predictions and not self.journal.has(self._entry(count))
        last = count - 1 if pending else max(unfinished, default=-1)
        streams = Streams(self.view, self.ids, self.device) if last >= 0 else None
        for index in range(count):
            layer = _Layer(index, {i: g for i, g in enumerate(self.plan.groups) if g.layer == index})
            targets = None
            if streams is not None and index <= last:
                targets = streams.run(index, streams.original)
            if index in unfinished and streams is not None and targets is not None:
                self._report(outcome, index, count)
                self._work(layer, streams, targets)
                self._write(layer)
            else:
                self._read(layer)
                outcome.resumed += len(layer.planned)
            if predictions:  # errors are counted against the original weights, which are about to go
                self.originals |= {i: self._weights(group, "cpu") for i, group in layer.planned.items()}
            self._apply(layer)
            if streams is not None and targets is not None:
                streams.original = targets
                if index < max(unfinished, default=-1):
                    streams.compressed = streams.run(index, streams.compressed)
            for i, info in layer.infos.items():
                outcome.groups[i] = info
            outcome.layers.append({"layer": index} | layer.info)
        final = None if streams is None else streams.original
        if streams is not None:
            streams.close()
        self._report(outcome, count, count)
        if predictions:
            outcome.predictions = self._predictions(outcome, final if pending else None)
        return outcome

    def _predictions(self, outcome: Outcome, targets: Tensor | None) -> dict[str, Any]:
        """Refine all groups together, or take over what an interrupted run found; they replace the groups' entries.

        Args:
            outcome: gets the errors of the groups as they are now.
            targets: output of the original model's last layer; None: the entry exists.
        """
        entry = self._entry(len(self.view.layers))
        specs = [group.spec for group in self.plan.groups]
        if targets is not None and self.recipe.refine is not None:
            before = [self.journal.read(i)[0] for i in range(len(specs))]
            tuned, info = refine_predictions(
                self.view,
                list(zip(specs, before, strict=True)),
                self.ids,
                targets,
                self.recipe.refine,
                seed=derived_seed(self.recipe.seed, "refine predictions"),
                device=self.device,
                dtype=self.dtype,
                progress=self.progress,
            )
            flat = {f"{i} {key}": tensor for i, packed in enumerate(tuned) for key, tensor in packed.items()}
            self.journal.write(entry, flat, info)
        found, info = self.journal.read(entry)
        packed: list[dict[str, Tensor]] = [{} for _ in specs]
        for name, tensor in found.items():
            number, key = name.split(" ", 1)
            packed[int(number)][key] = tensor
        for i, group in enumerate(self.plan.groups):
            outcome.groups[i] |= self._measure(
                group, packed[i], None, tuple(w.to(self.device) for w in self.originals.pop(i))
            )
            self.journal.write(i, packed[i], outcome.groups[i])
        return info

    def _entry(self, layer: int) -> int:
        return len(self.plan.groups) + layer

    def _report(self, outcome: Outcome, done: int, count: int) -> None:
        energy = sum(info["energy"] for info in outcome.groups if info)
        error = sum(info["missed"] for info in outcome.groups if info) / energy if energy else None
        name = f"{self.view.layers_name}.{done}" if done < count else ""
        self.progress("factorise", done, count, name, error)

    def _work(self, layer: _Layer, streams: Streams, targets: Tensor) -> None:
        begun = time.perf_counter()
        tensors: dict[str, Tensor] = {}
        moments: dict[LinearGroup, Moments] = {}
        for i, group in layer.planned.items():
            if self.recipe.anchor and group.source not in moments:
                moments[group.source] = streams.moments(layer.index, group.source, tensors)
            layer.packed[i], layer.infos[i] = self._factorise(group, moments.get(group.source))
            tensors |= self._dense(layer.index, group, layer.packed[i])
        layer.info["block_error_before"] = block_error(streams, layer.index, tensors, targets)
        layer.info["block_error"] = layer.info["block_error_before"]
        if self.recipe.refine is not None and layer.planned:
            refined = refine_layer(
                streams,
                layer.index,
                [(group.spec, layer.packed[i]) for i, group in layer.planned.items()],
                targets,
                self.recipe.refine,
                seed=derived_seed(self.recipe.seed, f"refine {layer.index}"),
                dtype=self.dtype,
            )
            layer.others = refined.others
            layer.packed = dict(zip(layer.planned, refined.packed, strict=True))
            for i, group in layer.planned.items():
                layer.infos[i] |= self._measure(group, layer.packed[i], moments.get(group.source))
                tensors |= self._dense(layer.index, group, layer.packed[i])
            after = block_error(streams, layer.index, tensors | self._on_device(refined.others), targets)
            layer.info |= {"block_error": after, "refine": refined.info}
        layer.info["seconds"] = time.perf_counter() - begun

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def _weights(self, group: PlannedGroup, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
        return tuple(self.view.weight(name).to(device or self.device, copy=True).float() for name in group.spec.modules)

    def _factorise(self, group: PlannedGroup, moments: Moments | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        begun = time.perf_counter()
        weights = self._weights(group)
        if moments is None:
            statistics = self.store.load(group.source)
            gram, mean_abs, targets = statistics.mean_gram.to(self.device), statistics.mean_abs.to(self.device), weights
        else:
            gram, mean_abs = moments.gram, moments.mean_abs
            targets = tuple(
                anchored_target(w, moments, ridge=ANCHOR_RIDGE, blend=ANCHOR_BLEND).float() for w in weights
            )
        name = group.spec.name
        fisher = tuple(self.fisher[m].to(self.device) for m in group.spec.modules if m in self.fisher)
        problem = Problem(name, targets, (gram,), (mean_abs,), fisher, derived_seed(self.recipe.seed, name))
        packed = solve(get_method(group.spec.method), group.options, group.spec, problem, self.dtype)
        tensors = {key: tensor.cpu() for key, tensor in packed.items()}
        return tensors, self._measure(group, tensors, moments) | {"seconds": time.perf_counter() - begun}

    def _measure(
        self,
        group: PlannedGroup,
        packed: dict[str, Tensor],
        moments: Moments | None,
        original: tuple[Tensor, ...] | None = None,
    ) -> dict[str, Any]:
        """Errors against the original model; with `moments`, also that of the output in the compressed one.

        Args:
            group: which.
            packed: its tensors.
            moments: of its input in both streams.
            original: its weights, where the model no longer holds them.
        """
        weights, packed = original or self._weights(group), self._on_device(packed)
        gram = self.store.load(group.source).mean_gram.to(self.device)
        info: dict[str, Any] = measure(weights, packed, group.spec, (gram,))
        if moments is not None:
            weight, approximation = torch.cat(weights, 1), rebuild(packed, group.spec)
            info["anchored_error"] = anchored_error(weight, approximation, moments, info["energy"])
        return info

    def _dense(self, index: int, group: PlannedGroup, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by name within the layer, as ``nn.Linear`` holds them, in the model's dtype."""
        weight = rebuild(self._on_device(packed), group.spec).T
        prefix = f"{self.view.layers_name}.{index}."
        parts = zip(group.spec.modules, torch.split(weight, list(group.spec.d_out)), strict=True)
        return {f"{m.removeprefix(prefix)}.weight": part.to(self.view.weight(m).dtype) for m, part in parts}

    @torch.no_grad()
    def _apply(self, layer: _Layer) -> None:
        """Put the compressed weights, norms and biases into the model."""
        tensors = dict(layer.others)
        for i, group in layer.planned.items():
            tensors |= self._dense(layer.index, group, layer.packed[i])
        parameters = dict(self.view.layers[layer.index].named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)

    def _write(self, layer: _Layer) -> None:
        for i, packed in layer.packed.items():
            self.journal.write(i, packed, layer.infos[i])
        self.journal.write(self._entry(layer.index), layer.others, layer.info)

    def _read(self, layer: _Layer) -> None:
        for i in layer.planned:
            layer.packed[i], layer.infos[i] = self.journal.read(i)
        layer.others, layer.info = self.journal.read(self._entry(layer.index))
