"""Train the language model that is embedded in the package, on the source of the Python standard library.

    python scripts/train_embedded.py --out src/cospadi/embedded/model --report model.json --validate-every 33

The same corpus, seed, versions and hardware give the same bytes: the order of the data is fixed by the seed, only
deterministic kernels are used, and the report holds the SHA-256 of corpus and weights to check it. Since the library
changes with every Python, ``--write-corpus FILE`` stores the texts of the running Python and ``--corpus FILE`` trains
on a stored one, also on a machine with another Python.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cospadi.embedded import stdlib_sources

END = "<|endoftext|>"
VOCABULARY = 2048
# A line end with the indentation of the next line is one piece, so that a block's depth costs one token; a word may
# carry the space, dot or underscore before it; digits go in threes.
PIECES = r"(?:\r?\n)+[ \t]*|[ ._]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\S\n]+"
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WARM_UP = 0.04
BETAS = (0.9, 0.95)
LAST_RATE = 0.01


@dataclass(frozen=True)
class Corpus:
    """Texts by part, each after its path in the library, and the Python they are from."""

    parts: dict[str, list[tuple[str, str]]]
    python: str

    def lines(self) -> Iterator[str]:
        """The corpus as lines of JSON; their bytes define its SHA-256."""
        for part, documents in self.parts.items():
            for name, text in documents:
                record = {"python": self.python, "part": part, "name": name, "text": text}
                yield json.dumps(record, ensure_ascii=False) + "\n"

    def sha256(self) -> str:
        """SHA-256 of the lines."""
        digest = hashlib.sha256()
        for line in self.lines():
            digest.update(line.encode())
        return digest.hexdigest()

    def texts(self, part: str) -> list[str]:
        """The texts of one part."""
        return [text for _, text in self.parts[part]]


def running_corpus() -> Corpus:
    """The training and held-out texts of the running Python."""
    parts = {"train": stdlib_sources("train"), "heldout": stdlib_sources("heldout")}
    return Corpus(parts, platform.python_version())


def read_corpus(path: Path) -> Corpus:
    """A corpus written by ``--write-corpus``."""
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    versions = set()
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            record = json.loads(line)
            parts[record["part"]].append((record["name"], record["text"]))
            versions.add(record["python"])
    if len(versions) != 1 or not all(parts.values()):
        raise SystemExit(f"{path}: a corpus needs training and held-out texts of one Python, this has {versions}")
    return Corpus(parts, versions.pop())


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without unknown tokens and without a normaliser: decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts as one int64 stream (tokens,), the end token between them and around them."""
    end = MODEL["eos_token_id"]
    ids = [end]
    for encoded in tokenizer.backend_tokenizer.encode_batch(list(texts)):
        ids += [*encoded.ids, end]
    return torch.tensor(ids, dtype=torch.int64)


def batches(stream: Tensor, steps: int, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Blocks (batch, length + 1) of the stream; every pass cuts it at another offset and shuffles the blocks."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        blocks = stream[offset:].unfold(0, length + 1, length)
        order = torch.randperm(len(blocks), generator=generator).to(stream.device)
        for chosen in order.split(batch)[: len(order) // batch]:
            if done == steps:
                return
            yield blocks[chosen]
            done += 1


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to a small share of the peak."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    falling = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return peak * (LAST_RATE + (1 - LAST_RATE) * falling)


def train(model: LlamaForCausalLM, stream: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Train in place with AdamW; returns what the report says about it."""
    device = stream.device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=device.type == "cuda")
    losses = []
    model.train()
    start = time.perf_counter()
    for step, block in enumerate(batches(stream, options.steps, options.batch, options.length, options.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        # Other attention kernels have no deterministic backward pass.
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
        ):
            logits = model(input_ids=block[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, options.steps // 20) == 0 or step + 1 == options.steps:
            losses.append([step + 1, round(loss.item(), 4)])
            print(f"step {step + 1}/{options.steps}  loss {losses[-1][1]:.4f}", flush=True)
    seconds = time.perf_counter() - start
    seen = options.steps * options.batch * options.length
    return {
        "optimizer": "AdamW",
        "betas": BETAS,
        "learning_rate": options.lr,
        "weight_decay": options.weight_decay,
        "warm_up": WARM_UP,
        "steps": options.steps,
        "tokens_per_step": options.batch * options.length,
        "sequence_length": options.length,
        "tokens_seen": seen,
        "passes": round(seen / len(stream), 2),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(seen / seconds),
        "losses": losses,
    }


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, Any]:
    """Perplexity per token: the texts joined by the end token, cut into blocks that do not overlap.

    The last partial block is dropped and each block's first token is not predicted.
    """
    length = MODEL["max_position_embeddings"]
    stream = token_stream(tokenizer, texts)[1:-1]
    blocks = stream[: len(stream) // length * length].view(-1, length)
    if not len(blocks):
        raise SystemExit(f"the text to evaluate has {len(stream)} tokens, fewer than a block of {length}")
    total = 0.0
    model.eval()
    for some in blocks.to(model.device).split(8):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1].double()
        total += float(functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
    nats = total / (blocks.numel() - len(blocks))
    size = sum(len(text.encode()) for text in texts)
    return {
        "perplexity": math.exp(nats),
        "bits_per_byte": nats / math.log(2) * len(stream) / size,
        "tokens": blocks.numel() - len(blocks),
        "sequence_length": length,
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """What the bytes of the result depend on besides seed and versions."""
    found: dict[str, Any] = {"device": device.type, "machine": platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries."""
    named = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, safetensors)}
    return {"python": platform.python_version(), **named}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write-corpus", type=Path, metavar="FILE", help="store the running Python's texts and stop")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="train on a stored corpus")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the model goes")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the report goes (JSON)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--validate-every",
        type=int,
        default=0,
        metavar="N",
        help="train without every N-th file and report the perplexity on those, to choose settings by",
    )
    options = parser.parse_args(argv)
    if options.write_corpus is None and (options.out is None or options.report is None):
        parser.error("name --out and --report, or --write-corpus")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    corpus = read_corpus(options.corpus) if options.corpus else running_corpus()
    if options.write_corpus:
        with options.write_corpus.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(corpus.lines())
        return 0
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(options.seed)
    device = torch.device(options.device)

    texts, apart = corpus.texts("train"), []
    if options.validate_every:
        apart = texts[:: options.validate_every]
        texts = [text for index, text in enumerate(texts) if index % options.validate_every]
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))  # on the CPU, hence the same on every device
    print(f"{model.num_parameters():,} weights, {len(stream):,} tokens of text", flush=True)
    training = train(model.to(device), stream.to(device), options)

    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    # Judged is what was stored, in the arithmetic of a CPU's default.
    stored = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device)
    for path in options.out.iterdir():
        path.chmod(0o644)
    files = {path.name: path.read_bytes() for path in sorted(options.out.iterdir())}
    report = {
        "command": shlex.join(["python", "scripts/train_embedded.py", *(sys.argv[1:] if argv is None else argv)]),
        "seed": options.seed,
        "hardware": hardware(device),
        "versions": versions(),
        "corpus": {
            "python": corpus.python,
            "sha256": corpus.sha256(),
            "files": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(stream),
        },
        "model": {**MODEL, "weights": model.num_parameters()},
        "training": training,
        "heldout": evaluate(stored, tokenizer, corpus.texts("heldout")),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    if apart:
        report["validation"] = evaluate(stored, tokenizer, apart)
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: report.get(key) for key in ("heldout", "validation", "files")}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
