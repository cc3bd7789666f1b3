"""The only code that knows the structure of a transformers model: loading, linear groups, layer-by-layer replay."""

from cospadi.model_view.classes import model_class, predicts_tokens, require_predictions
from cospadi.model_view.discover import discover, discover_layers
from cospadi.model_view.loading import open_config, open_model, open_tokenizer, skeleton
from cospadi.model_view.locating import model_name, source_name, weights_directory
from cospadi.model_view.positions import check_length
from cospadi.model_view.replay import LayerReplay
from cospadi.model_view.view import LinearGroup, ModelView, check_weights, embedding_weight, where_not_finite

__all__ = [
    "LayerReplay",
    "LinearGroup",
    "ModelView",
    "check_length",
    "check_weights",
    "discover",
    "discover_layers",
    "embedding_weight",
    "model_class",
    "model_name",
    "open_config",
    "open_model",
    "open_tokenizer",
    "predicts_tokens",
    "require_predictions",
    "skeleton",
    "source_name",
    "weights_directory",
    "where_not_finite",
]
