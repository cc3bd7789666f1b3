"""The configurations that describe a model's blocks."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def configs_of(model: PreTrainedModel, *others: Any) -> list[PreTrainedConfig]:
    """The distinct configurations of a model: of its parts, its own, and that of its text part.

    Args:
        model: whose configurations are wanted.
        others: further candidates, put first; whatever is not a configuration is skipped.
    """
    found: list[PreTrainedConfig] = []
    for config in (*others, model.config, model.config.get_text_config()):
        if isinstance(config, PreTrainedConfig) and not any(config is other for other in found):
            found.append(config)
    return found
