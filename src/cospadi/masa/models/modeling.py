"""A Llama decoder whose attention matrices are combinations of matrices shared by all layers (arXiv 2508.04581)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from cospadi.masa.models.attention import composed_together, share_attention
from cospadi.masa.models.configuration import PROJECTIONS, MasaConfig, stock_fields
from cospadi.masa.models.shared_model import SharedAttentionModel


class MasaModel(SharedAttentionModel, LlamaModel):
    """The decoder without a head; ``shared_attention`` holds the shared matrices."""

    config_class = MasaConfig

    def __init__(self, config: MasaConfig) -> None:
        super().__init__(config)
        self.shared_attention = share_attention([cast(nn.Module, layer.self_attn) for layer in self.layers], config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like Llama's decoder; in training the weights of all layers are composed together first."""
        with composed_together(self, self.layers, self.shared_attention):
            return super().forward(*args, **kwargs)


class MasaForCausalLM(SharedAttentionModel, LlamaForCausalLM):
    """The language model."""

    config_class = MasaConfig

    def __init__(self, config: MasaConfig) -> None:
        # skips LlamaForCausalLM, which would build and initialise a dense decoder that is not used
        super(LlamaForCausalLM, self).__init__(config)
        self.model = MasaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def to_llama(self) -> LlamaForCausalLM:
        """Convert to a stock dense Llama, which loads without this package.

        Returns:
            A new model in evaluation mode, of the same dtype and device; its outputs are equal up to rounding.
        """
        config = LlamaConfig(**stock_fields(cast(MasaConfig, self.config)))
        with torch.device("meta"):
            dense: Any = LlamaForCausalLM(config)
        layers = range(len(self.model.layers))
        ours = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in layers for name in PROJECTIONS]
        weights = {f"{name}.weight": cast(Tensor, self.get_submodule(name).weight).detach().clone() for name in ours}
        weights |= {name: tensor.clone() for name, tensor in self.state_dict().items() if name in dense.state_dict()}
        dense.load_state_dict(weights, strict=True, assign=True)
        dense.tie_weights()
        dense.model.rotary_emb = type(dense.model.rotary_emb)(config).to(self.device)
        dense.generation_config = self.generation_config
        result: LlamaForCausalLM = dense.eval()
        return result
