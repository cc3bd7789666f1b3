"""Tasks through lm-eval: local files of minimal pairs, last words or multiple choice, and lm-eval's own by name.

A local file is ``.jsonl``, one record a line; its keys say what it is:

- ``{"task", "good", "bad"}``: minimal pairs (BLiMP). Right if the good sentence is likelier; means per ``task`` too.
- ``{"text"}``: the last word is to be guessed from what stands before it (LAMBADA). Right if greedy decoding gives it.
- ``{"question", "choices", "answer"}``: multiple choice (ARC, PIQA); ``answer`` counts from 0. Right if the answer is
  likeliest, in all (``acc``) or per character (``acc_norm``).

Prompts and scores are those of lm-eval's tasks blimp, lambada_openai, arc_easy and piqa, without examples (zero-shot).
Nothing is written to the disk and nothing is fetched, unless a task of lm-eval itself is named.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.errors import CalibrationError, ResourceError
from cospadi.progress import PhaseProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Record = dict[str, Any]
BATCHES = 16, 128
"""Fewest and most sequences at once."""
LOGITS_A_TOKEN = 1 << 21
"""Most logits that the sequences of a batch have at one position; small models are bound by launches, not by work."""
SUFFIXES = (".jsonl",)


@dataclass(frozen=True)
class _Form:
    """A form of records.

    Attributes:
        keys: that every record has.
        convert: from a record to what the lm-eval task reads; ValueError says what is wrong with the record.
        config: of the lm-eval task.
    """

    keys: tuple[str, ...]
    convert: Callable[[Record], Record]
    config: dict[str, Any]


def _pair(record: Record) -> Record:
    good, bad = _strings(record, "good", "bad")
    return {"context": "", "choices": [good, bad], "answer": 0, "paradigm": str(record["task"])}


def _last_word(record: Record) -> Record:
    (text,) = _strings(record, "text")
    context, blank, word = text.rpartition(" ")
    if not context.strip() or not word.strip():
        raise ValueError('"text" needs at least two words, the last of which is to be guessed')
    return {"context": context, "target": blank + word}


def _choice(record: Record) -> Record:
    (question,) = _strings(record, "question")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError('"choices" must be a list of at least two texts')
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be the place of the right choice, 0 to {len(choices) - 1}, not {answer!r}')
    return {"context": f"Question: {question}\nAnswer:", "choices": choices, "answer": answer}


def _strings(record: Record, *keys: str) -> list[str]:
    for key in keys:
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f'"{key}" must be a text that is not empty')
    return [record[key] for key in keys]


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


_CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
FORMS = {
    "minimal pairs": _Form(("task", "good", "bad"), _pair, _CHOICE | {"metric_list": _metrics("acc")}),
    "multiple choice": _Form(
        ("question", "choices", "answer"), _choice, _CHOICE | {"metric_list": _metrics("acc", "acc_norm")}
    ),
    "last word": _Form(
        ("text",),
        _last_word,
        {
            "output_type": "loglikelihood",
            "doc_to_target": "target",
            "target_delimiter": "",
            "metric_list": _metrics("acc"),
        },
    ),
}


@dataclass(frozen=True)
class TaskFile:
    """A local task.

    Attributes:
        name: the file's name without suffix.
        form: which of `FORMS`.
        records: as the lm-eval task reads them.
    """

    name: str
    form: str
    records: tuple[Record, ...]

    @property
    def sha256(self) -> str:
        """Of form and records: what a score depends on, apart from the model."""
        return hashlib.sha256(json.dumps([self.form, self.records], sort_keys=True).encode()).hexdigest()

    def config(self, prefix: str) -> dict[str, Any]:
        """What lm-eval takes as a task; the records travel in memory."""
        from datasets import Dataset, DatasetDict

        def records(**_: Any) -> DatasetDict:
            return DatasetDict(test=Dataset.from_list(list(self.records)))

        return {
            "task": prefix + self.name,
            "custom_dataset": records,
            "test_split": "test",
            "doc_to_text": "context",
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
            **FORMS[self.form].config,
        }


def read_task_file(path: Path, limit: int | None = None) -> TaskFile:
    """Read and check a local task.

    Args:
        path: ``.jsonl``, one record a line; empty lines are skipped.
        limit: take so many records: the first, but of minimal pairs the first of every paradigm, then the second …

    Raises:
        CalibrationError: if the file cannot be read, a line is no record, or a record lacks a key (naming both) or
            holds a wrong value.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    form, records = "", []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
        form = form or _form_of(record, where)
        records.append(_converted(record, form, where))
    if not records:
        raise CalibrationError(f"{path}: holds no record")
    return TaskFile(path.stem, form, tuple(_limited(records, limit)))


def _form_of(record: object, where: str) -> str:
    """The form that shares most keys with a record: a record that lacks one of them is told so, not called unknown."""
    keys = record.keys() if isinstance(record, dict) else ()
    shared = {name: sum(key in keys for key in form.keys) / len(form.keys) for name, form in FORMS.items()}
    best = max(shared, key=shared.__getitem__)
    if not shared[best]:
        known = "; ".join(f"{name} {{{', '.join(form.keys)}}}" for name, form in FORMS.items())
        raise CalibrationError(f"{where} is none of the known records: {known}")
    return best


def _converted(record: object, form: str, where: str) -> Record:
    missing = [key for key in FORMS[form].keys if not isinstance(record, dict) or key not in record]
    if missing:
        wanted = ", ".join(FORMS[form].keys)
        raise CalibrationError(f'{where} has no "{missing[0]}" ({form}: {{{wanted}}})')
    assert isinstance(record, dict)
    try:
        return FORMS[form].convert(record)
    except ValueError as error:
        raise CalibrationError(f"{where}: {error}") from None


def _limited(records: list[Record], limit: int | None) -> list[Record]:
    if limit is None or limit >= len(records):
        return records
    if "paradigm" not in records[0]:
        return records[:limit]
    seen: dict[str, int] = {}
    turns = []
    for record in records:
        turns.append(seen.get(record["paradigm"], 0))
        seen[record["paradigm"]] = turns[-1] + 1
    chosen = sorted(range(len(records)), key=lambda i: (turns[i], i))[:limit]
    return [records[i] for i in sorted(chosen)]


def find_tasks(items: Sequence[str], limit: int | None = None) -> tuple[list[TaskFile], list[str]]:
    """Local tasks and names of lm-eval's own tasks.

    Args:
        items: paths of ``.jsonl`` files or of directories of such, or names.
        limit: records of each local task.

    Raises:
        CalibrationError: if a path does not exist or a file cannot be used.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"--limit must be at least 1, not {limit}")
    paths: list[Path] = []
    names: list[str] = []
    for item in items:
        path = Path(item).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            if not inside:
                raise CalibrationError(f"{item}: this directory holds no task file (.jsonl)")
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
    progress: PhaseProgress | None = None,
) -> dict[str, Any]:
    """Score a model with lm-eval, wherever the model lies.

    Args:
        model: any causal language model, compressed or not.
        tokenizer: of the model.
        items: paths of local tasks or of directories of such, or names of lm-eval's own tasks.
        limit: examples of each task.
        batch: sequences at once; scores may differ in the last digits between sizes, so it depends on nothing but the
            vocabulary and is reported. None: 16 to 128, fewer for large vocabularies.
        seed: of everything that lm-eval draws.
        progress: called as progress(requests done, requests, what).

    Returns:
        ``tasks``: by name ``acc, acc_stderr, samples`` and more by form; of minimal pairs ``paradigms`` and their mean
        ``paradigm_mean``; ``harness``: what the numbers depend on (version of lm-eval, batch, seed, limit).

    Raises:
        CalibrationError: if a task is unknown or its file cannot be used.
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
            model=_language_model(model, tokenizer, batch, progress),
            tasks=[*(file.config(prefix) for file in files), *names],
            task_manager=manager,
            batch_size=batch,
            limit=limit if names else None,
            # Only for metrics of lm-eval's own tasks; the error of a mean is computed exactly.
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, progress: PhaseProgress | None
) -> Any:
    """The model as lm-eval takes it, with our progress in place of its bars."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):  # type: ignore[misc]
        asked = done = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.asked, self.done = len(requests), 0
            return super().loglikelihood(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            # Requests that differ in their last token only are answered by one sequence, so `asked` is an upper bound.
            self.done = min(self.done + len(inps), self.asked)
            if progress and self.asked:
                progress(self.done, self.asked, "tasks")
            return logits

    return Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _scores(metrics: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` and ``acc_stderr,none`` as ``acc`` and ``acc_stderr``; what is no number is left out."""
    plain = {key.partition(",")[0]: value for key, value in metrics.items() if "," in key}
    return {key: float(value) for key, value in plain.items() if isinstance(value, int | float)}


def _details(form: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm-eval does not sum up by itself."""
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
    """Keep lm-eval's remarks on how it was called, and its own bars, to itself for a while."""
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
