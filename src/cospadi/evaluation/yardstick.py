"""How every row of a comparison is measured: with the same texts, tasks, arithmetic and peak memory counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cospadi.calibration import Texts
from cospadi.evaluation.perplexity import perplexity
from cospadi.evaluation.tasks import find_tasks, run_tasks
from cospadi.progress import Progress
from cospadi.runtime.devices import placed
from cospadi.runtime.memory import memory_errors, peak_memory

ARITHMETIC = {
    "float32": "in float32, with every compressed weight reconstructed in float64 and rounded to float32",
    "model": "in the model's data type, with every compressed weight reconstructed and rounded to it",
}


@dataclass(frozen=True)
class Yardstick:
    """How a model is measured.

    Attributes:
        texts: by name; the row's ``perplexity`` is that of the first.
        seq_len: tokens per block.
        max_blocks: evaluate at most this many blocks from the start of each text.
        batch: blocks per batch.
        arithmetic: ``"float32"``: rows differ only by their weights, not by the rounding of activations, which would
            hide small differences; ``"model"``: in the checkpoint's dtype, with half the memory.
        tasks: for :func:`~cospadi.evaluation.tasks.run_tasks`.
        limit: number of examples per task.
        seed: of the tasks.
        bos: whether blocks and examples begin with the BOS: ``"auto"`` (where the tokenizer adds it), ``"on"`` or
            ``"off"``.
    """

    texts: Mapping[str, Texts]
    seq_len: int = 1024
    max_blocks: int | None = None
    batch: int | None = None
    arithmetic: str = "float32"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    bos: str = "auto"

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type to which shorter weights are widened; None to keep their own."""
        return torch.float32 if self.arithmetic == "float32" else None

    def fingerprint(self) -> dict[str, Any]:
        """Everything a measurement depends on besides the model."""
        files, names = find_tasks(self.tasks, self.limit)
        return {
            "texts": {name: text.sha256 for name, text in self.texts.items()},
            "seq_len": self.seq_len,
            "max_blocks": self.max_blocks,
            "arithmetic": self.arithmetic,
            "bos": self.bos,
            "tasks": {file.name: file.sha256 for file in files} | dict.fromkeys(names, self.limit),
        }

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        progress: Progress,
        weights: Callable[[torch.device], Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Any]:
        """Measure a model; afterwards it is unchanged, bit for bit.

        Args:
            model: dense.
            tokenizer: of the model.
            device: where to measure.
            progress: called as progress(phase, done, total, detail).
            weights: called with the device; returns parameters by name that replace the model's own temporarily.

        Returns:
            ``perplexity`` on the first text; ``texts``: by name ``perplexity, bits_per_byte, word_perplexity, tokens,
            blocks, begins_with``; and, with tasks, ``tasks`` and ``harness``.
        """
        found: dict[str, Any] = {"texts": {}}
        with memory_errors(), placed(model, device, self.dtype):
            for name, tensor in (weights(device) if weights else {}).items():
                parameter = model.get_parameter(name)
                parameter.data = tensor.to(parameter.dtype).contiguous()
            for name, text in self.texts.items():
                measured = perplexity(
                    model,
                    tokenizer,
                    text,
                    seq_len=self.seq_len,
                    max_blocks=self.max_blocks,
                    batch=self.batch,
                    bos=self.bos,
                    device=device,
                    progress=partial(progress, "evaluate"),
                )
                found["texts"][name] = {
                    "perplexity": measured.perplexity,
                    "bits_per_byte": measured.bits_per_byte,
                    "word_perplexity": measured.word_perplexity,
                    "tokens": measured.tokens,
                    "blocks": measured.blocks,
                    "begins_with": measured.begins_with,
                }
            found["perplexity"] = next(iter(found["texts"].values()))["perplexity"] if found["texts"] else None
            if self.tasks:
                found |= run_tasks(
                    model,
                    tokenizer,
                    self.tasks,
                    limit=self.limit,
                    seed=self.seed,
                    bos=self.bos,
                    progress=partial(progress, "tasks"),
                )
        return found


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory counters of the device and, on Linux, of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int]:
    """Peak bytes since :func:`reset_peak`: ``peak_memory_bytes`` and, on a GPU, ``peak_device_bytes``."""
    found = {"peak_memory_bytes": peak_memory()["host"]}
    with suppress(OSError, ValueError, IndexError):
        # unlike ru_maxrss, this counter can be reset
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found["peak_memory_bytes"] = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    if device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found
