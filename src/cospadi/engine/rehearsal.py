"""Whatever could fail at the end of a run is tried at its start, on results without content.

Twice: the whole result, on ``meta``, is opened from its names and shapes; and a model of a few blocks, with random
numbers in the plan's kinds of layers, is written, opened and run.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cospadi.checkpoint import attach, format_for
from cospadi.checkpoint.fitting import fit, quietly
from cospadi.checkpoint.headers import Entry
from cospadi.checkpoint.write import write_model, write_side_files
from cospadi.engine.plan.plan import Plan
from cospadi.errors import BudgetError, CheckpointError, ModelError, OutputError
from cospadi.format import GroupSpec, Spec
from cospadi.format.leaves import codes_name, dictionary_name
from cospadi.io import no_space
from cospadi.kernels.synthetic import random_packed
from cospadi.model_view import ModelView, discover_layers, skeleton
from cospadi.pruning.depth.surgery import without_blocks

MOST_BLOCKS = 4
"""Blocks of the model that is written: one of each kind, at least two."""
MOST_BYTES = 500_000_000
"""A larger one is not written; the whole result has been opened from its headers by then."""
VOCABULARY = 512
_ROWS = 64  # random rows of codes; further rows repeat them
_TOWERS = ("num_hidden_layers", "depth", "num_layers")


def rehearse(
    view: ModelView,
    plan: Plan | None,
    tokenizer: PreTrainedTokenizerBase | None,
    extra: Mapping[str, Entry],
) -> None:
    """Try the end of a run before its work.

    Args:
        view: of the model, real or on ``meta``; it does not change.
        plan: what will be stored; None if blocks are removed first, and for a run that only prunes.
        tokenizer: saved beside the result, where it is known.
        extra: stored tensors that are copied.

    Raises:
        ModelError: if the result could not be saved or opened.
    """
    name = type(view.model).__name__
    try:
        with quietly(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            with TemporaryDirectory() as folder:
                view.model.config.save_pretrained(folder)
                write_side_files(view.model, tokenizer, Path(folder))
            _open_empty(view.model, [] if plan is None else plan.specs, extra)
            if plan is not None:
                _write_small(view, plan.specs)
    except (MemoryError, torch.OutOfMemoryError, OutputError):
        raise
    except Exception as error:
        if no_space(error):  # where temporary files go; the run itself writes elsewhere
            return
        cause = " ".join(f"{error}".split())[:240] or type(error).__name__
        raise ModelError(f"{name}: its result could not be saved and opened ({cause}); nothing was computed") from error


def _open_empty(model: PreTrainedModel, specs: Sequence[Spec], extra: Mapping[str, Entry]) -> None:
    """Open the whole result on ``meta`` from the names and shapes of its tensors."""
    kind: Any = type(model)
    empty = skeleton(copy.deepcopy(model.config), kind)
    if specs:
        format_for(specs).replace(empty, specs)
        attach(empty, specs)
    tied = set(getattr(empty, "all_tied_weights_keys", None) or {})
    stored = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in empty.state_dict().items() if name not in tied
    }
    with TemporaryDirectory() as folder:
        empty.config.architectures = [kind.__name__]
        empty.config.save_pretrained(folder)
        config: PreTrainedConfig = type(empty.config).from_pretrained(folder)
    found = fit(config, stored)
    fault = found.fault or (f"{min(found.extra)} belongs to no module" if found.extra else "")
    if not fault and (twice := stored.keys() & extra.keys()):
        fault = f"{min(twice)} is a tensor of the result and one that is copied unchanged"
    if fault:
        raise CheckpointError(fault)


def _write_small(view: ModelView, specs: Sequence[Spec]) -> None:
    """Write, open and run a model of a few blocks."""
    if not all(isinstance(spec, GroupSpec) for spec in specs):
        return
    made = _small(view, [spec for spec in specs if isinstance(spec, GroupSpec)])
    if made is None:
        return
    model, few = made
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > MOST_BYTES:
        return
    _fill(model, few)
    with TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 3 * size:
            return
        attach(model, few)
        with format_for(few).stored_dtypes(model):
            write_model(model, None, Path(folder))
        opened: Any = type(model).from_pretrained(folder, dtype="auto")
        with torch.no_grad():
            opened(input_ids=torch.arange(8)[None], use_cache=False)


def _small(view: ModelView, specs: Sequence[GroupSpec]) -> tuple[PreTrainedModel, list[GroupSpec]] | None:
    """A model of few blocks with a small vocabulary on ``meta``, and the specs of its layers.

    Returns:
        None where the architecture cannot be described with fewer blocks.
    """
    inside = re.compile(re.escape(view.layers_name) + r"\.(\d+)\.")
    blocks = {spec: {int(found[1]) for name in spec.modules if (found := inside.match(name))} for spec in specs}
    kept = sorted(_kept(view.layers, blocks[specs[0]]))
    places = {old: new for new, old in enumerate(kept)}
    config = copy.deepcopy(view.model.config)
    _shrink(config)
    try:
        small = discover_layers(skeleton(config, type(view.model)))
        gone = [index for index in range(len(view.layers)) if index not in places]
        if gone:
            without_blocks(small, gone)
    except (ModelError, BudgetError):
        return None

    def moved(name: str) -> str:
        return inside.sub(lambda found: f"{view.layers_name}.{places[int(found[1])]}.", name, count=1)

    few = [
        replace(spec, modules=tuple(map(moved, spec.modules)))
        for spec in specs
        if blocks[spec] and blocks[spec] <= places.keys()
    ]
    if not few:
        return None
    format_for(few).replace(small.model, few)
    return small.model, few


def _kept(layers: Sequence[nn.Module], first: set[int]) -> set[int]:
    """Blocks of every kind, as many as are allowed, those of the first group among them."""
    kinds: dict[tuple[Any, ...], int] = {}
    for index, layer in enumerate(layers):
        look = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        kinds.setdefault(look, index)
    found = set(first)
    for index in (*kinds.values(), *range(len(layers))):
        if len(found) < (MOST_BLOCKS if index in kinds.values() else 2):
            found.add(index)
    return found


def _shrink(config: PreTrainedConfig) -> None:
    """Make vocabulary and towers small; how the language model's blocks are built stays."""
    text = config.get_text_config()
    for part in {id(part): part for part in (config, text)}.values():
        if isinstance(getattr(part, "vocab_size", None), int):
            part.vocab_size = min(part.vocab_size, VOCABULARY)
        for key, value in vars(part).items():
            if key.endswith("pad_token_id") and isinstance(value, int):
                setattr(part, key, min(value, VOCABULARY - 1))
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and part is not text:
            for key in _TOWERS:
                if isinstance(getattr(part, key, None), int):
                    with suppress(Exception):  # a tower in its own size does as well
                        setattr(part, key, 1)


def _fill(model: PreTrainedModel, specs: Sequence[GroupSpec]) -> None:
    """Give a model on ``meta`` random numbers."""
    dtype = model.dtype
    fresh: dict[str, torch.Tensor] = {}
    for spec in specs:
        if spec.dictionary is not None:
            for role, tensor in _random(spec.dictionary, dtype).items():
                fresh[f"{spec.modules[0]}.{dictionary_name(role)}"] = tensor
        for index, name in enumerate(spec.modules):
            for role, tensor in _random(spec.module_codes(index), dtype).items():
                fresh[f"{name}.{codes_name(role)}"] = tensor
    for name, held in list(model.named_parameters()):
        value = fresh.get(name)
        if value is None:
            value = torch.empty(held.shape, dtype=held.dtype)
            value = value.normal_(std=0.02) if held.is_floating_point() else value.zero_()
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(value.to(held.dtype), False)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                module._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    tie: Any = model.tie_weights
    tie()


def _random(spec: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random stored matrix, of few different rows."""
    few = random_packed(replace(spec, rows=min(spec.rows, _ROWS)), dtype)
    sizes = {role: shape[0] for role, (shape, _) in spec.tensors(dtype).items()}  # a trellis spans several rows
    return {role: torch.cat([item] * -(-sizes[role] // len(item)))[: sizes[role]] for role, item in few.items()}
