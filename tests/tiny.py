"""Tiny random models of real architectures, and a byte-level tokenizer: no files, no network, milliseconds.

    model = tiny_model("qwen3")                 # float32, seeded, eval mode
    tokenizer = byte_tokenizer()                # 256 bytes and <|endoftext|> = 256
    path = save_tiny(tmp_path / "m", "llama")   # a checkpoint directory as transformers writes it

Sizes are awkward on purpose: d_in, d_out and the inner width are no powers of two and all differ.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
BOS = "<bos>"
VOCABULARY = 257
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Covered everywhere: plain, sliding window, biases on q/k/v, norms on q/k."""
MORE_ARCHITECTURES = ("gemma3_text", "phi3", "gpt_neox", "opt")
"""Masks that differ per layer, fused q/k/v and gate/up, parallel residual, biases everywhere and learned positions."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
_GATED: dict[str, Any] = {"intermediate_size": 44, "num_key_value_heads": 2, "head_dim": 6}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": 8},
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma3_text": _GATED
    | {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"intermediate_size": 44, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 44, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 44, "word_embed_proj_dim": 24},
}


def tiny_config(architecture: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Configuration of a tiny model; `overrides` win."""
    return AutoConfig.for_model(architecture, **(_COMMON | _SPECIFIC.get(architecture, {}) | overrides))


def tiny_model(
    architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model in eval mode.

    Weights are larger than at a usual initialisation and biases and norms are random too, so that a wrong bias, mask
    or norm changes the output visibly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides), dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
                else:
                    parameter.uniform_(0.5, 1.5)
    return model.eval()


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Token i is byte i for i < 256, token 256 is the end of a text; decoding is exact."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": END, "eos_token": END, "pad_token": END} | options
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    assert len(fast) == VOCABULARY or options
    return fast


def bos_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """The same with ``<bos>`` = 257, which it puts before every text, as Gemma and Llama do."""
    fast = byte_tokenizer(**options)
    fast.add_special_tokens({"bos_token": BOS})
    backend: Any = fast.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, VOCABULARY)]
    )
    assert fast("a").input_ids == [VOCABULARY, 97] and fast.bos_token_id == VOCABULARY
    return fast


def save_tiny(
    directory: str | Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "50KB",
    tokenizer: PreTrainedTokenizerFast | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny model and its tokenizer (by default `byte_tokenizer`) as a (sharded) checkpoint directory."""
    tiny_model(architecture, seed=seed, dtype=dtype, **overrides).save_pretrained(
        directory, max_shard_size=max_shard_size
    )
    (tokenizer or byte_tokenizer()).save_pretrained(directory)
    return Path(directory)


def token_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random tokens (batch, length), the end token among them."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_text(characters: int = 4000, *, seed: int = 0) -> str:
    """Random words with some structure: letters follow each other by a fixed random Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz  .\n"
    chain = torch.rand(len(letters), len(letters), generator=generator) ** 4
    state, out = 0, []
    for draw in torch.rand(characters, generator=generator).tolist():
        row = chain[state].cumsum(0)
        state = int(torch.searchsorted(row, draw * float(row[-1])).clamp_max(len(letters) - 1))
        out.append(letters[state])
    return "".join(out)


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2), in byte order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    symbol = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [symbol[byte] for byte in range(256)]
