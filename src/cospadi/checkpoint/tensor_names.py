"""Under which names `save_pretrained` writes a model's tensors.

For many architectures transformers renames stored tensors when it loads them, and undoes that when it saves. The
descriptions of the formats name modules of the model, so compressed models are saved under the names of their modules.
Stock models are saved as transformers would: under the names of the released checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_under_module_names(model: PreTrainedModel) -> None:
    """Make every later ``save_pretrained``, whoever calls it, write tensors under the names of the modules."""
    held: Any = model
    held._weight_conversions = []  # what was renamed at loading, and is named back at saving


def save_under_released_names(model: PreTrainedModel) -> None:
    """Undo :func:`save_under_module_names` for a model that has become a stock one."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model, add_legacy=False):
        vars(model).pop("_weight_conversions", None)  # transformers then takes those of the architecture
