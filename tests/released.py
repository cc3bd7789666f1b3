"""Tiny random models of classes that are more, or less, than a causal language model, saved as they are released."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from tiny import VOCABULARY, byte_tokenizer, tiny_config

IMAGE = 200
"""The id of the token that stands for an image."""
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
_GEMMA3: dict[str, Any] = {
    "text_config": _TEXT | {"sliding_window": 8},
    "vision_config": {
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": IMAGE,
    "boi_token_index": 201,
    "eoi_token_index": 202,
}
_QWEN3_5: dict[str, Any] = {
    "text_config": _TEXT
    | {
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 6,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "num_position_embeddings": 16,
    },
    "image_token_id": IMAGE,
}
_NEMOTRON: dict[str, Any] = _TEXT | {
    "layer_types": ["mamba", "attention", "mlp", "mamba"],
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "ssm_state_size": 8,
    "n_groups": 2,
}


def released_model(
    kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of a class of transformers, such as ``Gemma3ForConditionalGeneration``, in eval mode."""
    settings = {
        "Gemma3ForConditionalGeneration": ("gemma3", _GEMMA3),
        "Qwen3_5ForConditionalGeneration": ("qwen3_5", _QWEN3_5),
        "NemotronHForCausalLM": ("nemotron_h", _NEMOTRON),
        "Lfm2ForCausalLM": (
            "lfm2",
            _TEXT | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        ),
    }
    family, *_ = (
        (name for name in ("Llama", "Mistral", "Qwen2", "Qwen3") if kind.startswith(name))
        if kind not in settings
        else ("",)
    )
    if kind in settings:
        name, values = settings[kind]
        config = AutoConfig.for_model(name, **(values | overrides))
    else:
        config = tiny_config(family.lower(), **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)._from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                elif "norm" in name or name.endswith("bias"):
                    parameter.uniform_(0.1, 0.3)
    return model.eval()


def save_released(directory: str | Path, kind: str, *, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """Write such a model and a tokenizer as transformers saves them: under the names of the released checkpoints."""
    released_model(kind, dtype=dtype, **overrides).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return Path(directory)


def add_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to the single weight file of a checkpoint, as a released one has that holds more than its class."""
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})
