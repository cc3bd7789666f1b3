"""The only code that knows the structure of a transformers model: loading, linear groups, layer-by-layer replay."""

from cospadi.model_view.classes import model_class, predicts_tokens, require_predictions
from cospadi.model_view.discover import discover, discover_layers
from cospadi.model_view.in_memory import InMemory, Source, config_of, kind_of, model_source, name_of
from cospadi.model_view.loading import open_config, open_model, open_tokenizer, skeleton
from cospadi.model_view.locating import model_name, weights_directory
from cospadi.model_view.positions import check_ids, check_length
from cospadi.model_view.replay import LayerReplay
from cospadi.model_view.view import LinearGroup, ModelView, check_weights, embedding_weight, where_not_finite

__all__ = [
    "InMemory",
    "LayerReplay",
    "LinearGroup",
    "ModelView",
    "Source",
    "check_ids",
    "check_length",
    "check_weights",
    "config_of",
    "discover",
    "discover_layers",
    "embedding_weight",
    "kind_of",
    "model_class",
    "model_name",
    "model_source",
    "name_of",
    "open_config",
    "open_model",
    "open_tokenizer",
    "predicts_tokens",
    "require_predictions",
    "skeleton",
    "weights_directory",
    "where_not_finite",
]
