"""Trains small language models with different attention sharing on the same tokens, and writes one table.

    python examples/masa/train.py --tiny --out out/masa-tiny
    accelerate launch examples/masa/train.py --data text.jsonl.xz --tokenizer DIR --out out/masa --seeds 0 1 2

The same command again goes on where it was stopped. See README.md beside this file.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from data import STDLIB, Batches, Tokens, alone, begun, prepare, replace_text
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoTokenizer

from cospadi.embedded import model_path
from cospadi.errors import CospadiError, RecipeError
from cospadi.masa import MasaConfig, MasaForCausalLM, attention_parameters, removed_share
from cospadi.runtime.devices import device_name
from cospadi.runtime.fingerprints import versions

DESIGNS: dict[str, dict[str, Any]] = {
    "dense": {"attention_sharing": "dense"},
    "gqa": {"attention_sharing": "gqa", "num_key_value_heads": 1},
    "low_rank_third": {"attention_sharing": "low_rank"},
    "low_rank_sixth": {"attention_sharing": "low_rank", "attention_rank": 6},  # hidden size over this
    "sequential": {"attention_sharing": "sequential"},
    "repeat": {"attention_sharing": "repeat"},
    "masa_qkv": {"attention_sharing": "masa", "shared_types": ["q", "k", "v"]},
    "masa_qkvo": {"attention_sharing": "masa"},
    "masa_qkvo_slow": {"attention_sharing": "masa", "coefficient_rate": 0.1, "coefficient_start": "spread"},
}
ON_REQUEST = ("masa_qkvo_slow",)
"""Designs that are trained only if named."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result, besides design and seed. A directory holds runs of one such set.

    Attributes:
        data: what is trained on.
        tokenizer: directory.
        hidden, layers, heads, inner: shape of the decoder; S is a third of the layers.
        tokens: trained on, by each run.
        sequence: tokens in a block.
        batch: blocks in a step, of all processes together.
        rate: peak learning rate.
        validation: tokens held out.
        precision: "bf16" or "no", as accelerate names them.
        compiled: whether ``torch.compile`` is used.
    """

    data: str
    tokenizer: str
    hidden: int
    layers: int
    heads: int
    inner: int
    tokens: int
    sequence: int
    batch: int
    rate: float
    validation: int
    precision: str
    compiled: bool

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return max(1, self.tokens // (self.batch * self.sequence))


TINY: dict[str, Any] = {"hidden": 48, "layers": 6, "heads": 6, "inner": 128, "tokens": 60_000, "sequence": 64}
TINY |= {"batch": 8, "rate": 3e-3, "validation": 8_000}
SMALL: dict[str, Any] = {"hidden": 384, "layers": 12, "heads": 6, "inner": 1024, "tokens": 24_000_000, "sequence": 512}
SMALL |= {"batch": 64, "rate": 2e-3, "validation": 400_000}


def model_config(design: str, settings: Settings, tokenizer: Any) -> MasaConfig:
    """The configuration of one design at the shape of the settings."""
    fields = dict(DESIGNS[design])
    if "attention_rank" in fields:
        fields["attention_rank"] = settings.hidden // fields["attention_rank"]
    return MasaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=max(settings.sequence, 1024),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **fields,
    )


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine to zero."""
    warm = max(1, settings.steps // 10)
    if step < warm:
        return settings.rate * (step + 1) / warm
    return settings.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def optimizer_of(model: torch.nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay 0.1 for matrices, none for norms and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")


def save_state(path: Path, model: torch.nn.Module, optimizer: Any, step: int, seconds: float) -> None:
    """Everything needed to go on, in one safetensors file that is never half written."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].contiguous()
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, {"step": str(step), "seconds": repr(seconds)})
    os.replace(unfinished, path)  # noqa: PTH105


def load_state(path: Path, model: torch.nn.Module, optimizer: Any, device: torch.device) -> tuple[int, float]:
    """Go on from `save_state`; gives the steps and seconds done."""
    with safe_open(path, "pt", device=str(device)) as file:
        about = file.metadata()
        step = int(about["step"])
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
            state = {moment: file.get_tensor(f"{moment}/{name}") for moment in ("exp_avg", "exp_avg_sq")}
            counter = torch.tensor(float(step), device=device if device.type == "cuda" else "cpu")
            optimizer.state[parameter] = state | {"step": counter}
    return step, float(about["seconds"])


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, where there is one, before looking at the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def validation_perplexity(model: Any, tokens: Tokens, settings: Settings, accelerator: Accelerator) -> float:
    """Exp of the mean loss per predicted token of text, over blocks that do not overlap; the sum in float64."""
    blocks, begin = tokens.blocks(settings.sequence), len(tokens.begin)
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(blocks), settings.batch):
        ids = begun(blocks[start : start + settings.batch], tokens.begin).to(accelerator.device)
        with accelerator.autocast():
            logits = model(ids).logits[:, begin:-1]
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, begin + 1 :].flatten(), reduction="none")
        total += loss.double().sum()
    return math.exp(total.item() / (len(blocks) * (settings.sequence - begin - 1)))


def train(
    design: str,
    seed: int,
    settings: Settings,
    tokenizer: Any,
    parts: tuple[Tokens, Tokens],
    folder: Path,
    accelerator: Accelerator,
    save_every: float,
    stop_at: int | None = None,
) -> dict[str, Any] | None:
    """Train one model, or go on with it, and save it folded.

    Args:
        design: key of `DESIGNS`.
        seed: of weights and data order.
        settings: of all runs.
        tokenizer: saved beside the model.
        parts: training and validation tokens.
        folder: of this run.
        accelerator: devices and precision.
        save_every: seconds between two states.
        stop_at: stop after this step, as if killed.

    Returns:
        the row of the table; None if it stopped before the end.
    """
    done = folder / "result.json"
    if done.exists():
        row: dict[str, Any] = json.loads(done.read_text())
        return row
    set_seed(seed)
    device = accelerator.device
    model = MasaForCausalLM(model_config(design, settings, tokenizer)).to(device)
    optimizer = optimizer_of(model, device)
    state, step, before = folder / "state.safetensors", 0, 0.0
    if state.exists():
        step, before = load_state(state, model, optimizer, device)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(parts[0].blocks(settings.sequence), settings.batch, seed, share, parts[0].begin)
    wrapped = accelerator.prepare_model(model)
    forward = torch.compile(wrapped) if settings.compiled else wrapped
    first, began, saved = step, time.perf_counter(), time.perf_counter()
    forward.train()
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        ids = batches(step)
        ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids
        with accelerator.autocast():
            loss = forward(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == first + 5 and step < settings.steps:  # compilation and warm-up are no throughput
            synchronise(device)
            steady = time.perf_counter()
        stop = stop_at is not None and step >= stop_at
        # every process must decide alike, so the clock of the main one alone decides who writes
        if accelerator.is_main_process and (stop or (time.perf_counter() - saved > save_every)):
            save_state(state, model, optimizer, step, before + time.perf_counter() - began)
            saved = time.perf_counter()
        if accelerator.is_main_process and step % max(1, settings.steps // 10) == 0:
            print(f"  {design} seed {seed}: step {step}/{settings.steps}, loss {loss.item():.3f}", flush=True)
        if stop and step < settings.steps:
            return None
    synchronise(device)
    now = time.perf_counter()
    measured = step - first - 5
    speed = measured * settings.batch * settings.sequence / (now - steady) if measured > 0 else None
    accelerator.wait_for_everyone()
    model.eval()
    model.fold()
    model.compose()
    config = model.config
    row = {
        "design": design,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention_parameters": attention_parameters(config),
        "attention_removed": removed_share(config),
        "perplexity": validation_perplexity(model, parts[1], settings, accelerator),
        "tokens": settings.steps * settings.batch * settings.sequence,
        "tokens_per_second": speed,
        "seconds": before + now - began,
    }
    if accelerator.is_main_process:
        config.use_cache = True
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        replace_text(done, json.dumps(row, indent=1))
        state.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return row


def check_settings(out: Path, settings: Settings) -> None:
    """Note the settings in `out`, or compare them with those that its runs were started with.

    Raises:
        RecipeError: naming each field that differs.
    """
    path, now = out / "settings.json", asdict(settings)
    if path.exists():
        before = json.loads(path.read_text())
        other = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
        if other:
            raise RecipeError(f"{out}: was started with other settings ({'; '.join(other)}); choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(now, indent=1))


def merged(out: Path) -> list[dict[str, Any]]:
    """Rows of all finished runs in `out`, whichever process trained them: by seed, then in the order of `DESIGNS`."""
    rows = [json.loads(path.read_text()) for path in out.glob("*-*/result.json")]
    return sorted(rows, key=lambda row: (row["seed"], list(DESIGNS).index(row["design"])))


def table(rows: list[dict[str, Any]]) -> str:
    """One line a design: exact parameters, share of attention removed, perplexity and its deviation, speed."""
    lines = [f"{'design':<15} {'parameters':>11} {'attention':>10} {'removed':>8} {'perplexity':>16} {'tokens/s':>10}"]
    for design in dict.fromkeys(row["design"] for row in rows):
        runs = [row for row in rows if row["design"] == design]
        found = [run["perplexity"] for run in runs]
        spread = f" ±{statistics.stdev(found):.2f}" if len(found) > 1 else ""
        speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "–"
        first = runs[0]
        lines.append(
            f"{design:<15} {first['parameters']:>11,} {first['attention_parameters']:>10,} "
            f"{first['attention_removed']:>8.1%} {statistics.mean(found):>10.2f}{spread:<6} {speed:>10}"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=STDLIB, help=".txt or .jsonl file (or .xz of one), hub data set; %(default)s")
    parser.add_argument("--tokenizer", help="directory or hub id; default: that of the embedded model")
    parser.add_argument("--tiny", action="store_true", help="0.3 M parameters: a minute on a CPU")
    parser.add_argument(
        "--designs", nargs="+", choices=list(DESIGNS), default=[name for name in DESIGNS if name not in ON_REQUEST]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between two states; %(default)s")
    for name, kind in {name: type(value) for name, value in SMALL.items()}.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{SMALL[name]:,}; with --tiny {TINY[name]:,}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line says; gives the rows of the table."""
    options = parse(arguments)
    sizes = {name: getattr(options, name) or value for name, value in (TINY if options.tiny else SMALL).items()}
    precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    where = options.tokenizer or str(model_path())
    named = options.tokenizer or "embedded"
    settings = Settings(data=options.data, tokenizer=named, precision=precision, compiled=options.compile, **sizes)
    accelerator = Accelerator(mixed_precision=precision)
    if settings.batch % accelerator.num_processes:
        raise RecipeError(f"a batch of {settings.batch} does not divide among {accelerator.num_processes} processes")
    tokenizer = AutoTokenizer.from_pretrained(where)
    main_process = accelerator.is_main_process
    options.out.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first(), alone(options.out / "lock", wait=True):
        check_settings(options.out, settings)
        limit = min(settings.tokens, settings.steps * settings.batch * settings.sequence)
        parts = prepare(options.data, tokenizer, options.out / "tokens", limit=limit, validation=settings.validation)
    for seed in options.seeds:
        for design in options.designs:
            folder = options.out / f"{design}-{seed}"
            folder.mkdir(exist_ok=True)
            # what is finished is only read: processes may meet there
            training = main_process and not (folder / "result.json").exists()
            with alone(folder / "lock", wait=False) if training else nullcontext():
                row = train(design, seed, settings, tokenizer, parts, folder, accelerator, options.save_every)
            assert row is not None
            if main_process:
                print(f"{design} seed {seed}: perplexity {row['perplexity']:.3f}", flush=True)
    if not main_process:
        return merged(options.out)
    about = {"settings": asdict(settings), "processes": accelerator.num_processes, "versions": versions()}
    about |= {"hardware": device_name(accelerator.device), "command": " ".join(sys.argv)}
    with alone(options.out / "lock", wait=True):  # or a process that read the rows earlier could write them later
        rows = merged(options.out)
        replace_text(options.out / "results.json", json.dumps(about | {"rows": rows}, indent=1))
    print(table(rows))
    return rows


if __name__ == "__main__":
    try:
        main()
    except CospadiError as error:
        sys.exit(f"error: {error}")
