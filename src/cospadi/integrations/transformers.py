"""Native loading: ``AutoModelForCausalLM.from_pretrained(directory)`` after ``import cospadi``, or without any import.

transformers reads a checkpoint format once its name is registered. That happens

* on ``import cospadi.integrations.transformers`` and in `cospadi.checkpoint.load`, always;
* on ``import cospadi``, and when transformers is imported in an environment where this package is installed: see
  ``_cospadi_autoload.py`` and its off switches.
"""

from cospadi.checkpoint.hooks import FormatConfig, FormatQuantizer, register
from cospadi.masa.models.registration import register_models

register()
register_models()

__all__ = ["FormatConfig", "FormatQuantizer", "register"]
