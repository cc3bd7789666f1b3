"""Which class of transformers a checkpoint is opened as: the one that `architectures` in its configuration names."""

import inspect
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cospadi.errors import ModelError


def model_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that a configuration belongs to, heads and vision towers included.

    Args:
        config: of a checkpoint. Where its `architectures` names no class of transformers for such a configuration, it
            is taken for that of a causal language model.

    Returns:
        the class, and the configuration to build it from: the language model's own part where the class takes only
        that.

    Raises:
        ModelError: if transformers has no such class, if it reads no text, or if it is an encoder-decoder model.
    """
    names = [str(name) for name in getattr(config, "architectures", None) or []]
    told = ", ".join(names) or type(config).__name__
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config())):
        raise ModelError(f"{told} is an encoder-decoder model; only decoder-only models are supported")
    found = _named(names[0], config) if names else None
    if found is None:
        found, config = _causal(config, names, told)
    known: Any = AutoModelForCausalLM._model_mapping
    inputs = inspect.signature(found.forward).parameters
    # what also takes embeddings in place of tokens is built on a language model; two encoders side by side are not
    if "input_ids" not in inputs or not (type(config) in known or "inputs_embeds" in inputs):
        raise _unknown(told, config)
    return found, config


def predicts_tokens(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether a model, or a class of models, is a language model: its output is a distribution of the next token."""
    generates: Any = model.can_generate
    return bool(generates())


def require_predictions(model: PreTrainedModel | type[PreTrainedModel], what: str, remedy: str) -> None:
    """Refuse work that needs a language model's predictions.

    Args:
        model: real or on ``meta``, or a class.
        what: the work, as the beginning of a sentence.
        remedy: what to do instead.

    Raises:
        ModelError: if the model is a classifier, a reward or an embedding model.
    """
    if not predicts_tokens(model):
        name = (model if isinstance(model, type) else type(model)).__name__
        raise ModelError(f"{what} needs predictions of the next token, which {name} does not make; {remedy}")


def _named(name: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of this name, if transformers has it and builds it from such a configuration."""
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    expected = found.config_class
    return found if isinstance(expected, type) and isinstance(config, expected) else None


def _causal(config: PreTrainedConfig, names: list[str], told: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    known: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise _unknown(told, config)
    found = known[type(config)]
    if isinstance(found, tuple):
        found = next((item for item in found if item.__name__ in names), found[0])
    text = config.get_text_config()
    if text is not config and isinstance(text, found.config_class):
        config = text
    return found, config


def _unknown(told: str, config: PreTrainedConfig) -> ModelError:
    return ModelError(
        f"{told} (model type {config.model_type!r}) is not a causal language model that transformers knows, nor built "
        "on one"
    )
