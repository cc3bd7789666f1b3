"""What is measured: the configurations of some well-known models, and how their layers are stored.

Nothing is downloaded. A configuration is enough, because speed does not depend on the weights as long as they are not
all zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from cospadi.checkpoint import format_of
from cospadi.errors import ModelError, RecipeError
from cospadi.format import GroupSpec, MatrixSpec
from cospadi.methods import GroupShape, get_method
from cospadi.model_view import LinearGroup, ModelView, discover, discover_layers, model_name, open_config, skeleton
from cospadi.pruning.depth.surgery import without_blocks

METHOD = "pursuit"
"""The method that decides how factors within a budget are stored: the default of `cospadi compress`."""

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# Each from the config.json of the named repository on the hub.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {  # meta-llama/Meta-Llama-3-8B
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {  # meta-llama/Llama-3.2-1B
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": _LLAMA_3_ROPE,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {  # Qwen/Qwen3-8B
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": False,
    },
    "smollm2-135m": {  # HuggingFaceTB/SmolLM2-135M
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model's configuration, and the groups of a compressed checkpoint.

    Attributes:
        name: of the shape, or of the directory.
        config: of the dense model, in bfloat16.
        stored: the groups of a compressed checkpoint; empty for a dense model.
    """

    name: str
    config: PreTrainedConfig
    stored: tuple[GroupSpec, ...] = ()

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear groups of the dense model, split where a checkpoint stores parts of a group separately."""
        return tuple(part for g in discover(skeleton(self.config)).groups for part in _as_stored(g, self.stored))

    def build(self) -> PreTrainedModel:
        """The dense model on the ``meta`` device."""
        return skeleton(deepcopy(self.config))


def _as_stored(group: LinearGroup, stored: Sequence[GroupSpec]) -> list[LinearGroup]:
    """The parts of a group that a checkpoint stores separately, and the rest, which it left dense or shares."""
    widths = dict(zip(group.modules, group.d_out, strict=True))
    parts = [spec.modules for spec in stored if set(spec.modules) <= widths.keys()]
    apart = {name for modules in parts for name in modules}
    rest = tuple(name for name in group.modules if name not in apart)
    return [
        replace(group, modules=modules, d_out=tuple(widths[name] for name in modules))
        for modules in [*parts, rest]
        if modules
    ]


@dataclass(frozen=True)
class Variant:
    """One way to store the layers of a model.

    Attributes:
        label: for display.
        keep: share of bytes that was requested; for a checkpoint, its actual share.
        bits: of the dictionary and of the values; None for a checkpoint, which may mix them.
        specs: how each group is stored, by the names of its modules.
    """

    label: str
    keep: float
    bits: int | None
    specs: dict[tuple[str, ...], GroupSpec]

    def of(self, group: LinearGroup) -> GroupSpec | None:
        """How a group is stored; None if it stays dense."""
        return self.specs.get(group.modules)


def named_shape(name: str, layers: int | None = None) -> Subject:
    """A subject from the table of shapes.

    Args:
        name: a key of :data:`SHAPES`.
        layers: number of decoder layers to keep; None for all.

    Raises:
        RecipeError: if the name is not in the table.
        ModelError: if the model has fewer layers.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"there is no shape {name!r}{hint} (known: {', '.join(SHAPES)}; or name a model directory)")
    settings = dict(SHAPES[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return Subject(name, _prepared(config, name, layers))


def of_model(source: str | Path, layers: int | None = None) -> Subject:
    """A subject from the configuration of a model directory or hub id; no weights are read.

    Raises:
        ModelError: if it cannot be read, is quantised by another package, or has fewer layers.
        CheckpointError: if the description of a compressed checkpoint is invalid.
    """
    config = open_config(source)
    name = Path(model_name(source)).name
    quantisation = getattr(config, "quantization_config", None)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    found = format_of(quantisation)
    if quantisation is not None and (found is None or found.spec_type is not GroupSpec):
        raise ModelError(
            f"{source}: its layers are stored by {method or 'another package'!r}, whose speed this command does not "
            "measure; name a dense model or a checkpoint written by `cospadi compress`"
        )
    stored = () if found is None else found.parse(quantisation, f"{source}: config.json")
    if quantisation is not None:
        del config.quantization_config
    return Subject(name, _prepared(config, name, layers), stored)


def _prepared(config: PreTrainedConfig, name: str, layers: int | None) -> PreTrainedConfig:
    config.dtype = torch.bfloat16
    if layers is None:
        return config
    view: ModelView = discover_layers(skeleton(config))
    there = len(view.layers)
    if layers > there:
        raise ModelError(f"{name}: has {there} decoder layers, not {layers}; ask for at most as many")
    if layers < there:
        without_blocks(view, range(layers, there))
    shortened: PreTrainedConfig = view.model.config
    return shortened


def variants(subject: Subject, ways: Sequence[tuple[float, int]]) -> list[Variant]:
    """How the layers of a subject are stored: for each pair of keep and bits, or as in the checkpoint.

    Raises:
        BudgetError: if a keep is too small for these layers.
    """
    if subject.stored:
        known = {name for group in subject.groups for name in group.modules}
        specs = {spec.modules: spec for spec in subject.stored if known.issuperset(spec.modules)}
        if not specs:
            raise ModelError(f"{subject.name}: none of its groups fits the groups of the model; copy it again")
        share = sum(spec.bytes for spec in specs.values()) / sum(spec.dense_bytes for spec in specs.values())
        return [Variant("as stored", share, None, specs)]
    return [
        Variant(
            f"keep {keep:g}, {width} bits", keep, width, {g.modules: planned(g, keep, width) for g in subject.groups}
        )
        for keep, width in ways
    ]


def planned(group: LinearGroup, keep: float, bits: int) -> GroupSpec:
    """The spec that `pursuit` plans within a group's share of bytes, with `bits` bits for both factors.

    Raises:
        BudgetError: if the share is too small.
    """
    shape = GroupShape(group.modules, group.d_in, group.d_out)
    options = {"dictionary_bits": bits, "value_bits": bits}
    spec = get_method(METHOD).spec(shape, int(keep * group.dense_bytes), options)
    assert isinstance(spec, GroupSpec)
    return spec


def low_rank(group: LinearGroup, budget: int) -> GroupSpec:
    """Two dense 16-bit factors within `budget` bytes.

    Raises:
        BudgetError: if rank one needs more.
    """
    spec = get_method("svd").spec(GroupShape(group.modules, group.d_in, group.d_out), budget, {})
    assert isinstance(spec, GroupSpec)
    return spec


def bitmask(group: LinearGroup, budget: int) -> GroupSpec | None:
    """Unstructured pruning: 16-bit values and one mask bit per weight within `budget` bytes.

    This is what MACKO (arXiv 2511.13061) multiplies, with a bitmask in place of its 4-bit gaps. None if the mask alone
    exceeds the budget.
    """
    rows = sum(group.d_out)
    mask = MatrixSpec(rows, group.d_in, "free", 1).tensors()["mask"][0][1] * 4
    nonzeros = min(group.d_in, (budget // rows - mask) // 2)
    if nonzeros < 1:
        return None
    return GroupSpec(group.modules, group.d_in, group.d_out, MatrixSpec(rows, group.d_in, "free", nonzeros))


def shape_of(group: LinearGroup) -> tuple[int, int]:
    """Inputs and total outputs; groups that agree in both are measured once."""
    return group.d_in, sum(group.d_out)


def first_of_shape(subject: Subject) -> dict[tuple[int, int], LinearGroup]:
    """The first group of every shape, in reverse order of the shapes."""
    return {shape_of(group): group for group in reversed(subject.groups)}


def anonymous(spec: GroupSpec) -> GroupSpec:
    """The spec without module names, so that groups of different layers stored alike compare equal."""
    return replace(spec, modules=tuple("" for _ in spec.modules))
