"""Configurations of models whose attention matrices are shared between layers, and exact parameter counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.vit.configuration_vit import ViTConfig

from cospadi.errors import RecipeError
from cospadi.masa.models.coefficients import STARTS

DESIGNS = ("dense", "gqa", "low_rank", "sequential", "repeat", "masa")
"""In this order: every layer has its own matrices; there are fewer key and value heads; matrices have rank r;
consecutive layers share a matrix; matrices repeat cyclically; matrices are combinations of shared atoms."""
PROJECTIONS = ("q", "k", "v", "o")
WITH_ATOMS = ("sequential", "repeat", "masa")


@dataclass(kw_only=True)
class SharedAttentionFields:
    """The fields that the configurations of this module add to those of transformers.

    Attributes:
        attention_sharing: the design, one of `DESIGNS`.
        shared_types: projections that the design replaces, some of "q", "k", "v", "o"; the others stay dense. By
            default all four (MASA-QKVO); without "o" it is MASA-QKV. "dense" and "gqa" ignore it.
        num_atoms: S, the number of matrices stored per projection type for all layers together; by default a third of
            the number of layers.
        attention_rank: r of "low_rank"; by default a third of the hidden size, as in the paper's comparison.
        coefficient_embedding_size: width of the per-block embeddings that "masa" trains.
        coefficient_hidden_size: width of the perceptron that maps them to coefficients.
        coefficient_rate: learning rate of embeddings and perceptron under optimizers of the Adam family, relative to
            the other parameters. They are stored divided by it.
        coefficient_start: "network" for the output of a random perceptron on random embeddings, or "spread" for
            coefficients that differ as much as possible between layers.
        folded: whether coefficients are stored as plain numbers instead of computed by that perceptron.
        compose_weights: whether `from_pretrained` composes every layer's matrix once: fast, but as large as a dense
            model plus the atoms. Otherwise matrices are composed at every call and the model stays small.
    """

    attention_sharing: str = "masa"
    shared_types: list[str] | tuple[str, ...] = PROJECTIONS
    num_atoms: int | None = None
    attention_rank: int | None = None
    coefficient_embedding_size: int = 64
    coefficient_hidden_size: int = 64
    coefficient_rate: float = 1.0
    coefficient_start: str = "network"
    folded: bool = False
    compose_weights: bool = False


class MasaConfig(SharedAttentionFields, LlamaConfig):
    """A Llama decoder with shared attention matrices; the other fields are those of ``LlamaConfig``.

    Raises:
        RecipeError: if a field is invalid, for instance if there are more atoms than layers.
    """

    model_type = "masa"
    base_model_tp_plan = None  # type: ignore[assignment]  # Llama's plan would split layers that do not exist here

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _complete(self)
        heads, kept = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % kept:
            raise RecipeError(f"{heads} attention heads cannot share {kept} key and value heads evenly")
        if self.attention_sharing == "gqa" and kept == heads:
            raise RecipeError("attention_sharing 'gqa' needs num_key_value_heads smaller than num_attention_heads")
        if self.attention_sharing == "dense" and kept < heads:
            raise RecipeError(
                f"attention_sharing 'dense' has all {heads} key and value heads; {kept} of them are 'gqa'"
            )
        _announce()


class MasaViTConfig(SharedAttentionFields, ViTConfig):
    """A vision transformer with shared attention matrices; the other fields are those of ``ViTConfig``.

    Raises:
        RecipeError: if a field is invalid, for instance if there are more atoms than layers.
    """

    model_type = "masa_vit"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attention_sharing == "gqa":
            raise RecipeError("attention_sharing 'gqa' is not possible: a vision transformer has as many of all heads")
        _complete(self)
        _announce()


SharedAttentionConfig = MasaConfig | MasaViTConfig

_listeners: list[Callable[[], None]] = []


def when_created(listener: Callable[[], None]) -> None:
    """Have a function called whenever a configuration of this module is created.

    Model classes can be registered then: they are needed from now on, and transformers has been imported to the end.
    """
    if listener not in _listeners:
        _listeners.append(listener)


def _announce() -> None:
    for listener in _listeners:
        listener()


def _complete(config: SharedAttentionConfig) -> None:
    """Check the added fields and fill in defaults that depend on other fields."""
    design, layers = config.attention_sharing, config.num_hidden_layers
    if design not in DESIGNS:
        near = get_close_matches(str(design), DESIGNS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(DESIGNS)}"
        raise RecipeError(f"attention_sharing {design!r} is not known; {hint}")
    for name in ("num_atoms", "attention_rank", "coefficient_embedding_size", "coefficient_hidden_size"):
        value = getattr(config, name)
        if not isinstance(value, int) and (value is not None or name.startswith("coefficient")):
            raise RecipeError(f"{name} {value!r} must be a whole number")
    if not isinstance(config.coefficient_rate, int | float) or not 0 < config.coefficient_rate < math.inf:
        raise RecipeError(f"coefficient_rate {config.coefficient_rate!r} must be a number above 0")
    if config.coefficient_start not in STARTS:
        raise RecipeError(f"coefficient_start {config.coefficient_start!r} must be one of {', '.join(STARTS)}")
    types = list(config.shared_types or ())
    if not types or len(set(types)) != len(types) or not set(types) <= set(PROJECTIONS):
        raise RecipeError(f"shared_types {types} must be some of {', '.join(PROJECTIONS)}, each once")
    config.shared_types = [name for name in PROJECTIONS if name in types]
    if design in WITH_ATOMS:
        if config.num_atoms is None:
            config.num_atoms = max(1, layers // 3)
        if not 1 <= config.num_atoms <= layers:
            raise RecipeError(
                f"num_atoms {config.num_atoms} is not possible for {layers} layers: there must be at least one, and "
                "more atoms than layers would take more memory than dense layers"
            )
    if design == "low_rank":
        if config.attention_rank is None:
            config.attention_rank = max(1, config.hidden_size // 3)
        for name in config.shared_types:
            largest = min(projection_shapes(config)[name])
            if not 1 <= config.attention_rank <= largest:
                raise RecipeError(f"attention_rank {config.attention_rank} is not between 1 and {largest} ({name})")
    if min(config.coefficient_embedding_size, config.coefficient_hidden_size) < 1:
        raise RecipeError("coefficient_embedding_size and coefficient_hidden_size must be at least 1")


def stock_fields(config: SharedAttentionConfig) -> dict[str, Any]:
    """The configuration of the dense model of the same shape, as a dictionary without the fields added here."""
    added = {field.name for field in fields(SharedAttentionFields)} | {"model_type", "architectures"}
    return {name: value for name, value in config.to_dict().items() if name not in added}


def projection_shapes(config: SharedAttentionConfig) -> dict[str, tuple[int, int]]:
    """Configured shape (d_out, d_in) of one layer's weight, by projection type."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    query, key = (heads * size, hidden), (kept * size, hidden)
    return {"q": query, "k": key, "v": key, "o": (hidden, heads * size)}


def assignment(config: SharedAttentionConfig) -> tuple[int, ...] | None:
    """Index of the matrix that each layer uses: l·S // L for "sequential", l mod S for "repeat"; else None."""
    layers, atoms = config.num_hidden_layers, config.num_atoms
    if atoms is not None and config.attention_sharing == "sequential":
        return tuple(layer * atoms // layers for layer in range(layers))
    if atoms is not None and config.attention_sharing == "repeat":
        return tuple(layer % atoms for layer in range(layers))
    return None


def attention_parameters(config: SharedAttentionConfig, *, folded: bool = True) -> int:
    """Exact number of parameters of the attention matrices of all layers, biases excluded.

    Args:
        config: of the model.
        folded: count plain coefficients (L S per type). Otherwise count in their place the embeddings and perceptrons
            that are trained and that folding drops.

    Returns:
        The number of parameters.
    """
    layers, atoms, rank = config.num_hidden_layers, config.num_atoms or 0, config.attention_rank or 0
    wide, hidden = config.coefficient_embedding_size, config.coefficient_hidden_size
    total = 0
    for name, (rows, columns) in projection_shapes(config).items():
        shared = name in config.shared_types and config.attention_sharing not in ("dense", "gqa")
        if not shared:
            total += layers * rows * columns
        elif config.attention_sharing == "low_rank":
            total += layers * rank * (rows + columns)
        else:
            total += atoms * rows * columns
            if config.attention_sharing == "masa" and folded:
                total += layers * atoms
            elif config.attention_sharing == "masa":
                total += layers * wide + (wide + hidden + 2) * hidden + (hidden + 1) * atoms
    return total


def removed_share(config: SharedAttentionConfig) -> float:
    """Share of attention parameters removed, relative to a dense model with all key and value heads.

    For MASA-QKVO it is 1 − S (d h + L) / (L d h), the formula of arXiv 2508.04581.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    return 1 - attention_parameters(config) / (4 * config.num_hidden_layers * hidden * heads * size)
