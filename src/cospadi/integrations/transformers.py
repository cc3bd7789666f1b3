"""Native loading: ``AutoModelForCausalLM.from_pretrained(directory)`` after ``import cospadi`` or by itself.

transformers knows a quantization method once its two classes are registered. That happens

* on ``import cospadi.integrations.transformers`` and in `cospadi.checkpoint.load`, always;
* on ``import cospadi``, and by itself when transformers is imported in an environment where this package is installed:
  see ``_cospadi_autoload.py`` and its off switches.
"""

from cospadi.checkpoint.hf_quantizer import CospadiConfig, CospadiQuantizer, register
from cospadi.sharing.registration import register_models
from cospadi.sharing.shared_checkpoint_hf import register as register_shared

register()
register_shared()
register_models()

__all__ = ["CospadiConfig", "CospadiQuantizer", "register"]
