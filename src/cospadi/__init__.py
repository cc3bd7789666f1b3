"""Make a trained language model smaller without retraining.

    from cospadi import compress, load
    compress("path/or/hub-id", out="small", keep=0.6, calibration="text.jsonl")
    model, tokenizer = load("small")

Importing this package registers the checkpoint format with transformers as soon as transformers is imported, so that
``AutoModelForCausalLM.from_pretrained("small")`` works too. ``import cospadi`` is cheap: functions and classes are
loaded on first use, and torch only with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import _cospadi_autoload
from cospadi.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    CospadiError,
    ModelError,
    NumericalError,
    OutputError,
    RecipeError,
    ResourceError,
)

if TYPE_CHECKING:
    from cospadi.api.checkpoints import doctor, export, generate, inspect
    from cospadi.api.measures import benchmark, compare, evaluate
    from cospadi.api.runs import compress, estimate, prune
    from cospadi.engine.compress import Result
    from cospadi.engine.estimate.estimate import Estimate
    from cospadi.engine.prune import PruneResult
    from cospadi.evaluation import load
    from cospadi.recipe import Recipe

    __version__: str

_HOMES = {
    "Estimate": "cospadi.engine.estimate.estimate",
    "PruneResult": "cospadi.engine.prune",
    "Recipe": "cospadi.recipe",
    "Result": "cospadi.engine.compress",
    "benchmark": "cospadi.api.measures",
    "compare": "cospadi.api.measures",
    "compress": "cospadi.api.runs",
    "doctor": "cospadi.api.checkpoints",
    "estimate": "cospadi.api.runs",
    "evaluate": "cospadi.api.measures",
    "export": "cospadi.api.checkpoints",
    "generate": "cospadi.api.checkpoints",
    "inspect": "cospadi.api.checkpoints",
    "load": "cospadi.evaluation",
    "prune": "cospadi.api.runs",
}

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CospadiError",
    "Estimate",
    "ModelError",
    "NumericalError",
    "OutputError",
    "PruneResult",
    "Recipe",
    "RecipeError",
    "ResourceError",
    "Result",
    "benchmark",
    "compare",
    "compress",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "prune",
]

_cospadi_autoload.autoload()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'cospadi' has no attribute {name!r}")
    return _published(getattr(import_module(_HOMES[name]), name))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def _version() -> str:
    """The version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cospadi")
    except PackageNotFoundError:  # run from a source tree
        return "0+unknown"


def _published(item: Any) -> Any:
    """Let a public function or class name this package as its module, in `repr`, help and pickles."""
    if item.__module__ != __name__:
        if isinstance(item, type):
            # Annotations that are strings are resolved in the module that a class names.
            from typing import get_type_hints

            hints = get_type_hints(item, include_extras=True)
            item.__annotations__ = {key: hints[key] for key in item.__annotations__}
        item.__module__ = __name__
    return item
