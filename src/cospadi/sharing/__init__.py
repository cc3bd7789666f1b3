"""MASA: attention matrices of all layers as combinations of shared matrix atoms (arXiv 2508.04581).

`MasaConfig` and `MasaForCausalLM` train such a model from scratch, `MasaViTConfig` and `MasaViTForImageClassification`
a vision transformer; `cospadi.sharing.retrofit` shares the matrices of a model that is trained already.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.sharing.configuration import MasaConfig, MasaViTConfig, attention_parameters, removed_share
    from cospadi.sharing.modeling import MasaForCausalLM, MasaModel
    from cospadi.sharing.vision import MasaViTForImageClassification, MasaViTModel

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
    "MasaConfig": "configuration",
    "MasaViTConfig": "configuration",
    "attention_parameters": "configuration",
    "removed_share": "configuration",
    "MasaForCausalLM": "modeling",
    "MasaModel": "modeling",
    "MasaViTForImageClassification": "vision",
    "MasaViTModel": "vision",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cospadi.sharing' has no attribute {name!r}")
    return getattr(import_module(f"cospadi.sharing.{_HOMES[name]}"), name)
