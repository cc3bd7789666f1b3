"""Shared by the benchmarks of real models: texts in blocks, perplexity, divergence from the dense model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cospadi.calibration import Texts
from cospadi.calibration.blocks import cut

BATCH = 4


@dataclass(frozen=True)
class Stream:
    """A text in blocks of tokens that do not overlap.

    Attributes:
        blocks: int64 (count, seq_len).
        begin: tokens before the text of each block (BOS). Neither they nor the first token of the text are predicted.
    """

    blocks: Tensor
    begin: int

    def __len__(self) -> int:
        return len(self.blocks)


def stream(texts: Texts, tokenizer: PreTrainedTokenizerBase, most: int | None, seq_len: int) -> Stream:
    """A text in blocks, as the package's own perplexity takes it."""
    found = cut(texts, tokenizer, seq_len)
    blocks = found.blocks(range(min(found.available, most or found.available)))
    return Stream(torch.from_numpy(blocks), len(found.begin))


@torch.no_grad()
def measured(model: nn.Module, dense: nn.Module, text: Stream, device: torch.device) -> dict[str, float]:
    """Perplexity; KL to the dense model in nats a token; share of tokens whose most likely successor is the same."""
    loss = kl = same = torch.zeros((), dtype=torch.float64, device=device)
    count, first = 0, text.begin
    for part in torch.split(text.blocks, BATCH):
        ids = part.to(device)
        found, wanted = (
            m(input_ids=ids, use_cache=False).logits[:, first:-1].flatten(0, 1).float().log_softmax(-1)
            for m in (model, dense)
        )
        loss = loss - found.gather(1, ids[:, first + 1 :].reshape(-1, 1)).sum(dtype=torch.float64)
        kl = kl + (wanted.exp() * (wanted - found)).sum(-1).sum(dtype=torch.float64)
        same = same + (wanted.argmax(-1) == found.argmax(-1)).sum(dtype=torch.float64)
        count += found.shape[0]
    return {"perplexity": float((loss / count).exp()), "kl": float(kl / count), "top1": float(same / count)}
