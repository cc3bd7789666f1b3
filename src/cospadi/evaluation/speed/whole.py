"""Timing of whole models with random weights: a decode step, the prefill of a prompt, and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from cospadi.checkpoint import format_for
from cospadi.evaluation.speed.layers import Bench, StoredGroup, random_group
from cospadi.evaluation.speed.shapes import Subject, Variant, anonymous
from cospadi.evaluation.speed.timing import Call, Timed, alternate
from cospadi.format import GroupSpec
from cospadi.runtime.memory import guard_memory

CACHE_TOKENS = 1024
SEEN_TOKENS = 512
"""Positions that a decode step attends to; the rest of the cache is for the steps that are timed."""
WARM_STEPS = 3
"""Calls after which nothing is recompiled: the first step also creates the tensors of the cache."""
_REMEDY = "name a smaller shape or fewer layers (--layers)"


@torch.no_grad()
def random_model(subject: Subject, variant: Variant | None, device: torch.device, seed: int) -> PreTrainedModel:
    """A model with random weights, created on the device and in the form in which it will run.

    Compressed layers are never dense in between. Groups with the same spec hold the same numbers, in separate memory.

    Args:
        subject: the model.
        variant: how its groups are stored; None for the dense model.
        device: of the weights.
        seed: of all weights.

    Returns:
        The model in evaluation mode, without trainable parameters.
    """
    model = subject.build()
    specs = [] if variant is None else list(variant.specs.values())
    if specs:
        format_for(specs).replace(model, specs)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point() and parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1 if name.endswith("weight") and parameter.is_floating_point() else 0)
    initialise: Callable[[nn.Module], None] = model._init_weights
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            initialise(module)  # buffers that are computed, not stored, such as rotary frequencies
    made: dict[GroupSpec, StoredGroup] = {}
    for spec in specs:
        stored = made.setdefault(anonymous(spec), random_group(anonymous(spec), device, seed))
        format_for(spec).install(model, spec, stored.packed())
    model.train(False)
    return model


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all weights; shared ones count once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


def allocated(device: torch.device) -> int | None:
    """Bytes of tensors allocated on a GPU; None on a CPU, where PyTorch does not count them."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


class Decoder:
    """Repeated decode steps on a cache of fixed size, always with the same next token.

    The mask is created once, so that nothing in a step depends on values and a CUDA graph can capture it. A step
    attends to as many positions as in the middle of a conversation.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, compiled: bool = False) -> None:
        self.model: Callable[..., Any] = compiled_model(model) if compiled else model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
        self.token = torch.ones(1, 1, dtype=torch.long, device=device)
        self.position = torch.full((1, 1), SEEN_TOKENS, device=device)
        self.mask: Tensor | None = None
        if not any(self.cache.is_sliding):
            self.mask = (torch.arange(CACHE_TOKENS, device=device) <= SEEN_TOKENS).view(1, 1, 1, -1)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits (1, 1, vocabulary) of the next token."""
        output = self.model(
            self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def compiled_model(model: PreTrainedModel) -> Callable[..., Any]:
    """The model as a program of ``torch.compile``."""
    run: Callable[..., Any] = torch.compile(model)
    return run


@torch.no_grad()
def _prefill(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False, logits_to_keep=1).logits
    return logits


def measure_model(
    subject: Subject,
    variants: Sequence[Variant],
    bench: Bench,
    prompt: int,
    say: Callable[[str], None] = lambda _: None,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Decode step, prefill and memory of a model in every variant, each timed alternately with the dense model.

    Args:
        subject: the model.
        variants: how its groups are stored.
        bench: device, rounds, seed.
        prompt: tokens of a prefill.
        say: called with the label of each variant.
        compiled: run both models through ``torch.compile``.

    Yields:
        A row for the dense model, with None for the keep, then one per variant.
    """
    device = bench.device
    with guard_memory(f"measuring {subject.name} as a whole", _REMEDY):
        say("dense")
        before = allocated(device)
        dense = random_model(subject, None, device, bench.seed)
        known = {"shape": subject.name, "layers": dense.config.get_text_config().num_hidden_layers, "prompt": prompt}
        known["compiled"] = compiled
        yield _memory(dense, before, device) | known | {"variant": "dense", "keep": None, "bits": None}
        for variant in variants:
            say(variant.label)
            before = allocated(device)
            model = random_model(subject, variant, device, bench.seed)
            with torch.no_grad():
                model(torch.ones(1, 1, dtype=torch.long, device=device), use_cache=False)  # joins the codes of siblings
            row = _memory(model, before, device) | known
            row |= {"variant": variant.label, "keep": variant.keep, "bits": variant.bits}
            yield row | _times(dense, model, bench, prompt, compiled)
            del model


def _memory(model: PreTrainedModel, before: int | None, device: torch.device) -> dict[str, Any]:
    after = allocated(device)
    device_bytes = None if after is None or before is None else after - before
    return {"weight_bytes": parameter_bytes(model), "device_bytes": device_bytes}


def _times(
    dense: PreTrainedModel, model: PreTrainedModel, bench: Bench, prompt: int, compiled: bool = False
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    tokens = torch.randint(0, dense.config.get_text_config().vocab_size, (1, prompt)).to(bench.device)
    for prefill in (False, True):
        if compiled:
            torch.compiler.reset()  # programs of other models count towards the limit of recompilations
        calls: dict[str, list[Call]] = {}
        for name, one in (("dense", dense), ("ours", model)):
            if prefill:
                call: Call = partial(_prefill, compiled_model(one) if compiled else one, tokens)
            else:
                call = Decoder(one, bench.device, compiled).step
            for _ in range(WARM_STEPS if compiled else 0):
                call()
            calls[name] = [call]
        rounds = bench.rounds if prefill else 2 * bench.rounds
        if bench.device.type == "cuda":
            row |= _summary("prefill_graph" if prefill else "decode_graph", alternate(calls, bench.device, rounds))
        launched = alternate(calls, bench.device, rounds, graphs=False)
        row |= _summary("prefill" if prefill else "decode_eager", launched)
    return row


def _summary(mode: str, timed: dict[str, Timed]) -> dict[str, float]:
    ours, dense = timed["ours"], timed["dense"]
    return {
        f"{mode}_ms": ours.median * 1e3,
        f"dense_{mode}_ms": dense.median * 1e3,
        f"{mode}_of_dense": ours.over(dense),
    }
