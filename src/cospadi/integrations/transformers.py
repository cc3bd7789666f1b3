"""Native loading: ``AutoModelForCausalLM.from_pretrained(directory)`` after ``import cospadi`` or by itself.

transformers knows a quantization method once its two classes are registered. That happens

* on ``import cospadi.integrations.transformers`` and in `cospadi.checkpoint.load`, always;
* on ``import cospadi``, and by itself when transformers is imported in an environment where this package is installed:
  see ``_cospadi_autoload.py`` and its off switches.
"""

from cospadi.checkpoint.formats.factored_hf import CospadiConfig, CospadiQuantizer, register
from cospadi.checkpoint.formats.shared_hf import register as register_shared
from cospadi.masa.models.registration import register_models

register()
register_shared()
register_models()

__all__ = ["CospadiConfig", "CospadiQuantizer", "register"]
