"""Open models from a local directory, without any network, or from a hub id. Failures become one clear line."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cospadi.errors import ModelError
from cospadi.model_view.classes import model_class
from cospadi.model_view.explaining import explained
from cospadi.model_view.locating import inside, is_directory, located
from cospadi.model_view.weight_files import check_files
from cospadi.runtime.memory import guard_memory

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def open_config(source: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a decoder-only model.

    Args:
        source: a local directory, or a hub id.
        revision: of a hub id.

    Returns:
        the configuration; no weights are read.

    Raises:
        ModelError: if there is none, if it cannot be read, or if it is not of a decoder-only model that reads text.
    """
    options = located(source, revision)
    with explained(source, "cannot read its config.json"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(**options)
    try:
        model_class(config)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    return config


def open_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer stored beside a model.

    Raises:
        ModelError: if there is none or it cannot be read.
    """
    options = located(source, revision)
    if is_directory(options) and not any(inside(options, name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{source}: has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); copy the model's there")
    with explained(source, "its tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**options)
    return tokenizer


def open_model(
    source: str | Path, *, revision: str | None = None, warn: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer onto the CPU, in the dtype of the checkpoint, in eval mode.

    `architectures` in the configuration decides the class: a causal language model, a vision-language model, a
    classifier, a reward model, or a bare decoder. Local directories are read without any network. Code in the
    checkpoint is never run, and pickled weights are never opened.

    Args:
        source: a local directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        warn: of stored tensors that the class does not take; otherwise the caller takes care of them.

    Returns:
        model and tokenizer.

    Raises:
        ModelError: if anything is missing, unreadable or unsupported, or if the weights do not cover the model.
        ResourceError: if there is not enough memory.
    """
    config = open_config(source, revision=revision)
    tokenizer = open_tokenizer(source, revision=revision)
    _check_quantisation(source, config)
    options = located(source, revision)
    if is_directory(options):
        check_files(inside(options))
    remedy = "use a machine with more memory"
    with explained(source, "cannot read its weights"), guard_memory(f"loading {source}", remedy):
        kind, own = model_class(config)
        loaded: Any = kind.from_pretrained(
            **options,
            config=own,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below, with a clearer message
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    _check_loaded(source, info, warn)
    model.train(False)
    return model, tokenizer


def _check_loaded(source: str | Path, info: dict[str, Any], warn: bool) -> None:
    # transformers fills missing and misshapen weights with random numbers, which no command can use
    wrong = sorted(info.get("mismatched_keys", ()))
    if wrong:
        name, there, expected = wrong[0]
        raise ModelError(
            f"{source}: {len(wrong)} weights do not have the shape that config.json says "
            f"(first: {name} is {tuple(there)}, not {tuple(expected)}); config.json belongs to another model"
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights are missing (first: {missing[0]}); the checkpoint is incomplete, or "
            "config.json belongs to another model"
        )
    spare = sorted(info.get("unexpected_keys", ()))
    if spare and warn:  # extra heads are common and harmless, cut layers are not: the user must judge
        warnings.warn(
            f"{source}: {len(spare)} stored weights are not part of the model (first: {spare[0]})", stacklevel=3
        )


def skeleton(config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model on ``meta``: all shapes, no memory. Takes seconds for any size.

    Args:
        config: of a decoder-only model.
        kind: its class; None for the one that the configuration names.

    Raises:
        ModelError: if transformers cannot build it.
    """
    if kind is None:
        kind, config = model_class(config)
    with explained(kind.__name__, "cannot build the model"), torch.device("meta"):
        build: Any = kind._from_config
        model: PreTrainedModel = build(config)
    model.train(False)
    return model


def _check_quantisation(source: str | Path, config: PreTrainedConfig) -> None:
    """Refuse a format that transformers does not know: it would build dense layers with random weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    known: Any = AutoHfQuantizer.supports_quant_method
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and "quant_method" in stored and not known(stored):
        raise ModelError(
            f"{source}: transformers does not know its format {stored['quant_method']!r}; import the package that "
            "wrote it first (`import cospadi` for its own formats), or upgrade it"
        )
