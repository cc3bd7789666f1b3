"""Registers the models with shared attention with the auto classes of transformers."""

from __future__ import annotations


def register_configurations() -> None:
    """Register the configurations. May be called any number of times, also while transformers is half imported.

    The models follow when the first configuration is created (see `cospadi.masa.models`), which is before transformers
    looks up the class of a model.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    from cospadi.masa.models.configuration import MasaConfig, MasaViTConfig

    for config in (MasaConfig, MasaViTConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Register configurations and models. May be called any number of times."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

    from cospadi.masa.models.configuration import MasaConfig, MasaViTConfig
    from cospadi.masa.models.modeling import MasaForCausalLM, MasaModel
    from cospadi.masa.models.vision import MasaViTForImageClassification, MasaViTModel

    register_configurations()
    AutoModel.register(MasaConfig, MasaModel, exist_ok=True)
    AutoModelForCausalLM.register(MasaConfig, MasaForCausalLM, exist_ok=True)
    AutoModel.register(MasaViTConfig, MasaViTModel, exist_ok=True)
    AutoModelForImageClassification.register(MasaViTConfig, MasaViTForImageClassification, exist_ok=True)
