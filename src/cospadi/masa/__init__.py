"""MASA: attention matrices of all layers as combinations of shared matrix atoms (arXiv 2508.04581).

`MasaConfig` and `MasaForCausalLM` train such a model from scratch, `MasaViTConfig` and `MasaViTForImageClassification`
a vision transformer; `cospadi.masa.retrofit.method` shares the matrices of a model that is trained already.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.masa.models.configuration import MasaConfig, MasaViTConfig, attention_parameters, removed_share
    from cospadi.masa.models.modeling import MasaForCausalLM, MasaModel
    from cospadi.masa.models.vision import MasaViTForImageClassification, MasaViTModel

__all__ = [
    "MasaConfig",
    "MasaForCausalLM",
    "MasaModel",
    "MasaViTConfig",
    "MasaViTForImageClassification",
    "MasaViTModel",
    "attention_parameters",
    "removed_share",
]

# Loaded on first use: parts of this package are imported while transformers is half imported and has no models yet.
_HOMES = {
    "MasaConfig": "models.configuration",
    "MasaViTConfig": "models.configuration",
    "attention_parameters": "models.configuration",
    "removed_share": "models.configuration",
    "MasaForCausalLM": "models.modeling",
    "MasaModel": "models.modeling",
    "MasaViTForImageClassification": "models.vision",
    "MasaViTModel": "models.vision",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cospadi.masa' has no attribute {name!r}")
    return getattr(import_module(f"cospadi.masa.{_HOMES[name]}"), name)
