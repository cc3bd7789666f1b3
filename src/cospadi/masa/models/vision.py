"""A vision transformer for classification whose attention matrices are combinations of shared matrices."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel

from cospadi.masa.models.attention import composed_together, share_attention
from cospadi.masa.models.configuration import MasaViTConfig
from cospadi.masa.models.shared_model import SharedAttentionModel


class MasaViTModel(SharedAttentionModel, ViTModel):
    """The encoder; ``shared_attention`` holds the shared matrices. Each layer has its own biases.

    Args:
        config: of the model.
        add_pooling_layer: whether to add a pooling layer, as in ``ViTModel``.
    """

    config_class = MasaViTConfig

    def __init__(self, config: MasaViTConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.shared_attention = share_attention([cast(nn.Module, layer.attention) for layer in self.layers], config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like ViT's encoder; in training the weights of all layers are composed together first."""
        with composed_together(self, self.layers, self.shared_attention):
            return super().forward(*args, **kwargs)


class MasaViTForImageClassification(SharedAttentionModel, ViTForImageClassification):
    """The classifier."""

    config_class = MasaViTConfig

    def __init__(self, config: MasaViTConfig) -> None:
        # skips ViTForImageClassification, which would build and initialise a dense encoder that is not used
        super(ViTForImageClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.vit = MasaViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()
