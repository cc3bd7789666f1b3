"""Sequential runs: each decoder layer is fitted on the outputs of the compressed layers before it.

A method then gets the Grams of the compressed layers' outputs (`streams.Streams.statistics`). The *anchored* objective
also moves its targets (`streams.anchored_target`); *tuning* follows the factorisation (`block`, `distill`). Layers are
worked on in order; what is durable is a finished layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration import Statistics
from cospadi.engine.context import RunContext, shares_nothing
from cospadi.engine.factorise import measure, solve
from cospadi.engine.journal import Journal
from cospadi.engine.plan.order import order_of
from cospadi.engine.plan.plan import Plan, PlannedGroup
from cospadi.engine.tune.block import block_error, refine_layer
from cospadi.engine.tune.distill import refine_predictions
from cospadi.engine.tune.streams import Moments, Streams, anchored_error, anchored_target
from cospadi.errors import RecipeError
from cospadi.format import GroupSpec
from cospadi.model_view import LinearGroup
from cospadi.recipe import Recipe
from cospadi.runtime.fingerprints import derived_seed

ANCHOR_RIDGE = 1e-2
ANCHOR_SHARE = 0.5


@dataclass
class Outcome:
    """What a sequential run found.

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


def require_layers(plan: Plan) -> list[GroupSpec]:
    """Check that a plan can be worked on layer by layer.

    Returns:
        the specs of its groups.

    Raises:
        RecipeError: if a group spans several decoder layers, or is stored in another way than as dictionary and codes.
    """
    specs: list[GroupSpec] = []
    for group in plan.groups:
        if not isinstance(group.spec, GroupSpec):
            raise RecipeError(
                f"sequential, anchor and refine work on dictionaries and codes, and {group.spec.name} of method "
                f"{group.spec.method!r} has none: leave them out"
            )
        specs.append(group.spec)
        if not group.own_input:
            raise RecipeError(
                f"sequential, anchor and refine work layer by layer, and {group.spec.name} of method "
                f"{group.spec.method!r} spans several: leave them out, or choose another grouping"
            )
    return specs


class Sequential:
    """Factorise a whole model in order.

    The model ends up with the weights that the packed tensors stand for, and with tuned norms and biases.

    Args:
        context: of the run.
        plan: what will be stored.
        recipe: `sequential`, `anchor`, `refine`.
        journal: one entry for every group; one for every layer, which says that the layer is finished and holds its
            norms and biases; one for the tuning towards the predictions.
    """

    def __init__(self, context: RunContext, plan: Plan, recipe: Recipe, journal: Journal) -> None:
        self.specs, self.order = require_layers(plan), order_of(recipe, plan)
        self.context, self.plan, self.recipe, self.journal = context, plan, recipe, journal
        self.view, self.device = context.view, context.device
        self.originals: dict[int, tuple[Tensor, ...]] = {}

    def go(self) -> Outcome:
        """Work on all layers, or on those that an interrupted run left."""
        outcome = Outcome(groups=[{} for _ in self.plan.groups])
        count = len(self.view.layers)
        unfinished = [index for index in range(count) if not self.journal.layers.has(index)]
        refine = self.recipe.refine
        predictions = refine is not None and refine.output_steps > 0
        # what the original layers make of the text is known only as long as it has been followed through all of them
        pending = predictions and not self.journal.predictions.has(0)
        last = count - 1 if pending else max(unfinished, default=-1)
        streams = Streams(self.view, self.context.ids, self.device, self.context.weights) if last >= 0 else None
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
        specs = self.specs
        if targets is not None and self.recipe.refine is not None:
            before = [self.journal.groups.read(i)[0] for i in range(len(specs))]
            tuned, info = refine_predictions(
                self.view,
                list(zip(specs, before, strict=True)),
                self.context.ids,
                targets,
                self.recipe.refine,
                seed=derived_seed(self.context.seed, "refine predictions"),
                device=self.device,
                dtype=self.context.dtype,
                progress=self.context.progress,
            )
            flat = {f"{i} {key}": tensor for i, packed in enumerate(tuned) for key, tensor in packed.items()}
            self.journal.predictions.write(0, flat, info)
        found, info = self.journal.predictions.read(0)
        packed: list[dict[str, Tensor]] = [{} for _ in specs]
        for name, tensor in found.items():
            number, key = name.split(" ", 1)
            packed[int(number)][key] = tensor
        for i, group in enumerate(self.plan.groups):
            outcome.groups[i] |= self._measure(
                group, packed[i], None, tuple(w.to(self.device) for w in self.originals.pop(i))
            )
            self.journal.groups.write(i, packed[i], outcome.groups[i])
        return info

    def _report(self, outcome: Outcome, done: int, count: int) -> None:
        energy = sum(info["energy"] for info in outcome.groups if info)
        error = sum(info["missed"] for info in outcome.groups if info) / energy if energy else None
        name = f"{self.view.layers_name}.{done}" if done < count else ""
        self.context.progress("factorise", done, count, name, error)

    def _work(self, layer: _Layer, streams: Streams, targets: Tensor) -> None:
        begun = time.perf_counter()
        tensors: dict[str, Tensor] = {}
        moments: dict[LinearGroup, Moments] = {}
        collected: dict[LinearGroup, Statistics] = {}
        if self.order.compressed and not self.recipe.anchor:
            sources = dict.fromkeys(group.source for group in layer.planned.values())
            collected = streams.statistics(layer.index, tuple(sources))
        for i, group in layer.planned.items():
            if self.recipe.anchor and group.source not in moments:
                moments[group.source] = streams.moments(layer.index, group.source, tensors)
            layer.packed[i], layer.infos[i] = self._factorise(
                group, moments.get(group.source), collected.get(group.source)
            )
            tensors |= self._dense(layer.index, group, layer.packed[i])
        layer.info["block_error_before"] = block_error(streams, layer.index, tensors, targets)
        layer.info["block_error"] = layer.info["block_error_before"]
        if self.recipe.refine is not None and layer.planned:
            refined = refine_layer(
                streams,
                layer.index,
                [(self.specs[i], layer.packed[i]) for i in layer.planned],
                targets,
                self.recipe.refine,
                seed=derived_seed(self.context.seed, f"refine {layer.index}"),
                dtype=self.context.dtype,
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

    def _factorise(
        self, group: PlannedGroup, moments: Moments | None, collected: Statistics | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        begun = time.perf_counter()
        modules = group.spec.modules
        statistics = collected or self.context.statistics(modules, group.sources)[0]
        problem = self.context.problem_of(modules, [statistics], group.spec.name)
        plain, loss = statistics.mean_gram, statistics.loss
        if collected is not None or moments is not None:
            dense = self.context.statistics(modules, group.sources)[0]
            problem = replace(problem, dense_grams=(self.context.gram(modules, dense.mean_gram, dense.loss),))
        if moments is not None:
            plain, loss = moments.gram, moments.loss
            targets = (
                anchored_target(w, moments, ridge=ANCHOR_RIDGE, blend=self.recipe.anchor_share or ANCHOR_SHARE)
                for w in problem.weights
            )
            problem = replace(
                problem,
                weights=tuple(target.float() for target in targets),
                grams=(self.context.gram(modules, plain, loss),),
                mean_abs=(moments.mean_abs,),
            )
        if shares_nothing(group.spec):
            problem = self.context.apart(problem, modules, plain, loss)
        packed = solve(group.spec, group.options, problem)
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
        gram = self.context.store.load(group.source).mean_gram.to(self.device)
        info: dict[str, Any] = measure(weights, packed, group.spec, (gram,))
        if moments is not None:
            weight, approximation = torch.cat(weights, 1), group.spec.weight(packed)
            info["anchored_error"] = anchored_error(weight, approximation, moments, info["energy"])
        return info

    def _dense(self, index: int, group: PlannedGroup, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by name within the layer, as ``nn.Linear`` holds them, in the model's dtype."""
        weight = group.spec.weight(self._on_device(packed)).T
        prefix = f"{self.view.layers_name}.{index}."
        parts = zip(group.spec.modules, torch.split(weight, list(group.spec.shape.d_out)), strict=True)
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
            self.journal.groups.write(i, packed, layer.infos[i])
        self.journal.layers.write(layer.index, layer.others, layer.info)

    def _read(self, layer: _Layer) -> None:
        for i in layer.planned:
            layer.packed[i], layer.infos[i] = self.journal.groups.read(i)
        layer.others, layer.info = self.journal.layers.read(layer.index)
