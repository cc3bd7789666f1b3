"""Make a trained language model smaller without retraining.

    from cospadi import compress, load
    compress("path/or/hub-id", out="small", keep=0.6, calibration="text.jsonl")
    model, tokenizer = load("small")

Importing this package registers the checkpoint format with transformers as soon as transformers is imported, so that
``AutoModelForCausalLM.from_pretrained("small")`` works too. Names are loaded on first use: ``import cospadi`` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import _cospadi_autoload

if TYPE_CHECKING:
    from cospadi.engine.compress import Result, compress
    from cospadi.engine.estimate.estimate import Estimate, estimate
    from cospadi.engine.prune import PruneResult, prune
    from cospadi.evaluation import evaluate, load
    from cospadi.recipe import Recipe

__all__ = ["Estimate", "PruneResult", "Recipe", "Result", "compress", "estimate", "evaluate", "load", "prune"]
__version__ = "0.1.0"

_HOMES = {
    "Estimate": "cospadi.engine.estimate.estimate",
    "PruneResult": "cospadi.engine.prune",
    "Result": "cospadi.engine.compress",
    "compress": "cospadi.engine.compress",
    "estimate": "cospadi.engine.estimate.estimate",
    "evaluate": "cospadi.evaluation",
    "load": "cospadi.evaluation",
    "prune": "cospadi.engine.prune",
    "Recipe": "cospadi.recipe",
}

_cospadi_autoload.autoload()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cospadi' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
