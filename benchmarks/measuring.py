"""Shared by the benchmarks of real models: texts in blocks, perplexity, divergence from the dense model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cospadi.calibration import Texts
from cospadi.calibration.blocks import encode, join

BATCH = 4


def stream(texts: Texts, tokenizer: PreTrainedTokenizerBase, most: int | None, seq_len: int) -> Tensor:
    """Blocks (count, seq_len) that do not overlap."""
    ids = join(encode(texts, tokenizer), tokenizer.eos_token_id)
    count = min(len(ids) // seq_len, most or len(ids))
    return torch.from_numpy(ids[: count * seq_len].reshape(count, seq_len))


@torch.no_grad()
def measured(model: nn.Module, dense: nn.Module, blocks: Tensor, device: torch.device) -> dict[str, float]:
    """Perplexity; KL to the dense model in nats a token; share of tokens whose most likely successor is the same."""
    loss = kl = same = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for part in torch.split(blocks, BATCH):
        ids = part.to(device)
        found = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        wanted = dense(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        loss = loss - found.gather(1, ids[:, 1:].reshape(-1, 1)).sum(dtype=torch.float64)
        kl = kl + (wanted.exp() * (wanted - found)).sum(-1).sum(dtype=torch.float64)
        same = same + (wanted.argmax(-1) == found.argmax(-1)).sum(dtype=torch.float64)
        count += found.shape[0]
    return {
        "perplexity": float((loss / count).exp()),
        "kl": float(kl / count),
        "top1": float(same / count),
    }
