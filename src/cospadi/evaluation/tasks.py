"""Tasks run by lm-eval: local files of minimal pairs, last words or multiple choice, and lm-eval's own tasks by name.

Prompts and scores are those of lm-eval's tasks blimp, lambada_openai, arc_easy and piqa, zero-shot. Nothing is written
to disk, and nothing is downloaded unless one of lm-eval's own tasks is named.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.aliases import canonical_bos
from cospadi.calibration.begin import begin_ids, begin_text
from cospadi.errors import CalibrationError, ResourceError
from cospadi.evaluation.task_files import SUFFIXES, TaskFile, read_task_file
from cospadi.io import expanded
from cospadi.progress import PhaseProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCHES = 16, 128
"""Smallest and largest batch."""
LOGITS_A_TOKEN = 1 << 21
"""Limit of a batch's logits at one position; small models are bound by launches, not by computation."""


def find_tasks(items: Sequence[str], limit: int | None = None) -> tuple[list[TaskFile], list[str]]:
    """Split items into local tasks and names of lm-eval's own tasks.

    Args:
        items: paths of ``.jsonl`` files or of directories of them, or names.
        limit: number of records per local task.

    Raises:
        CalibrationError: if a path does not exist or a file cannot be used.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"--limit must be at least 1, not {limit}")
    paths: list[Path] = []
    names: list[str] = []
    for item in items:
        path = expanded(item)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            if not inside:
                raise CalibrationError(f"{item}: this directory contains no task files (.jsonl)")
            paths += inside
        elif path.is_file():
            paths.append(path)
        elif path.suffix or len(path.parts) > 1:
            raise CalibrationError(f"{item}: there is no such task file")
        else:
            names.append(item)
    files = [read_task_file(path, limit) for path in paths]
    twice = {f.name for f in files if sum(g.name == f.name for g in files) > 1}
    if twice:
        raise CalibrationError(f"two task files have the same name: {', '.join(sorted(twice))}; rename one")
    return files, names


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[str],
    *,
    limit: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    progress: PhaseProgress | None = None,
) -> dict[str, Any]:
    """Score a model with lm-eval on its current device.

    Args:
        model: any causal language model, compressed or not.
        tokenizer: of the model.
        items: paths of local tasks or of directories of them, or names of lm-eval's own tasks.
        limit: number of examples per task.
        batch: sequences per batch. Scores may differ in the last digits between batch sizes, so the default depends
            only on the vocabulary (16 to 128, fewer for large vocabularies) and is reported.
        seed: of everything that lm-eval draws.
        bos: whether examples begin with the BOS: ``"auto"`` (where the tokenizer adds it, as lm-eval does), ``"on"`` or
            ``"off"``. Texts without context are predicted from the BOS (or, without one, the end token) in any case.
        progress: called as progress(requests done, requests, phase).

    Returns:
        ``tasks``: by name ``acc, acc_stderr, samples`` and more depending on the form; for minimal pairs ``paradigms``
        and their mean ``paradigm_mean``; ``harness``: what the scores depend on (version of lm-eval, batch, seed,
        limit).

    Raises:
        CalibrationError: if a task is unknown or its file cannot be used.
        ModelError: if the model has no embedding for a token of an example.
        ResourceError: if lm-eval is not installed.
    """
    files, names = find_tasks(items, limit)
    version = require_lm_eval()
    if batch is None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        batch = max(BATCHES[0], min(BATCHES[1], LOGITS_A_TOKEN // vocabulary))
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=bool(names))
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise CalibrationError(f"there is no task file {name!r}, and lm-eval has no task of that name{hint}")
        prefix = "local_" if names else ""
        found = simple_evaluate(
            model=_language_model(model, tokenizer, batch, bos, progress),
            tasks=[*(file.config(prefix) for file in files), *names],
            task_manager=manager,
            batch_size=batch,
            limit=limit if names else None,
            # only for metrics of lm-eval's own tasks; the standard error of a mean is computed exactly
            bootstrap_iters=100,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    scores: dict[str, Any] = {}
    for file in files:
        scores[file.name] = _scores(found["results"][prefix + file.name]) | {"samples": len(file.records)}
        scores[file.name] |= _details(file.form, found["samples"][prefix + file.name])
    for name, metrics in found["results"].items():
        if name not in {prefix + file.name for file in files}:
            scores[name] = _scores(metrics) | {"samples": found["n-samples"].get(name, {}).get("effective")}
    return {"tasks": scores, "harness": {"lm_eval": version, "batch": batch, "seed": seed, "limit": limit}}


def require_lm_eval() -> str:
    """The version of lm-eval.

    Raises:
        ResourceError: if it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models.huggingface import HFLM  # noqa: F401
    except ImportError as error:
        raise ResourceError(f"tasks need lm-eval ({error}): pip install 'cospadi[eval]'") from None
    from importlib.metadata import version

    return version("lm_eval")


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, bos: str, progress: PhaseProgress | None
) -> Any:
    """The model as an lm-eval model, with our progress callback instead of its bars."""
    from lm_eval.models.huggingface import HFLM

    from cospadi.model_view import check_ids

    begin = begin_ids(tokenizer, bos)

    class Scorer(HFLM):  # type: ignore[misc]
        asked = done = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.asked, self.done = len(requests), 0
            return super().loglikelihood(requests, disable_tqdm=True)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is False or canonical_bos(bos) == "auto":
                found = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
            else:
                rest = string.removeprefix(begin_text(tokenizer, begin))
                found = [*begin, *super().tok_encode(rest, add_special_tokens=False, **kwargs)]
            check_ids(model, tokenizer, found)
            return list(found)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            # requests that differ only in their last token share a sequence, so `asked` is an upper bound
            self.done = min(self.done + len(inps), self.asked)
            if progress and self.asked:
                progress(self.done, self.asked, "tasks")
            return logits

    follows = {"auto": None, "on": True, "off": False}[canonical_bos(bos)]
    return Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=follows)


def _scores(metrics: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` and ``acc_stderr,none`` as ``acc`` and ``acc_stderr``; values that are not numbers are left out."""
    plain = {key.partition(",")[0]: value for key, value in metrics.items() if "," in key}
    return {key: float(value) for key, value in plain.items() if isinstance(value, int | float)}


def _details(form: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Summaries that lm-eval does not compute."""
    if form == "minimal pairs":
        by: dict[str, list[float]] = {}
        for sample in samples:
            by.setdefault(sample["doc"]["paradigm"], []).append(float(sample["acc"]))
        means = {name: sum(right) / len(right) for name, right in sorted(by.items())}
        return {"paradigm_mean": sum(means.values()) / len(means), "paradigms": means}
    if form == "last word":
        losses = [-float(sample["filtered_resps"][0][0]) for sample in samples]
        return {"perplexity": math.exp(min(sum(losses) / len(losses), 700.0))}
    return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's remarks and progress bars temporarily."""
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), getattr(task, "tqdm", None)
    before = logger.level
    logger.setLevel(logging.ERROR)
    if bar is not None:
        task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(before)
        if bar is not None:
            task.tqdm = bar
