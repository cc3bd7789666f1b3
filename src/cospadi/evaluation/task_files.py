"""Local files of tasks: minimal pairs, last words and multiple choice, as lm-eval reads them.

A local file is ``.jsonl`` with one record per line; the keys determine the kind of task:

- ``{"task", "good", "bad"}``: minimal pairs (BLiMP). Correct if the good sentence is more likely; also averaged per
  ``task``.
- ``{"text"}``: predict the last word from the words before it (LAMBADA). Correct if greedy decoding yields it.
- ``{"question", "choices", "answer"}``: multiple choice (ARC, PIQA); ``answer`` counts from 0. Correct if the answer
  is most likely, in total (``acc``) or per character (``acc_norm``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.errors import CalibrationError

Record = dict[str, Any]
SUFFIXES = (".jsonl",)


@dataclass(frozen=True)
class _Form:
    """A kind of record.

    Attributes:
        keys: of every record.
        convert: turns a record into what the lm-eval task reads; raises ValueError with the reason if it is invalid.
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
        raise ValueError('"text" needs at least two words')
    return {"context": context, "target": blank + word}


def _choice(record: Record) -> Record:
    (question,) = _strings(record, "question")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError('"choices" must be a list of at least two strings')
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be the index of the correct choice, 0 to {len(choices) - 1}, not {answer!r}')
    return {"context": f"Question: {question}\nAnswer:", "choices": choices, "answer": answer}


def _strings(record: Record, *keys: str) -> list[str]:
    for key in keys:
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f'"{key}" must be a non-empty string')
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
        name: of the file, without suffix.
        form: a key of `FORMS`.
        records: as the lm-eval task reads them.
    """

    name: str
    form: str
    records: tuple[Record, ...]

    @property
    def sha256(self) -> str:
        """Digest of form and records: everything a score depends on besides the model."""
        return hashlib.sha256(json.dumps([self.form, self.records], sort_keys=True).encode()).hexdigest()

    def config(self, prefix: str) -> dict[str, Any]:
        """The task's configuration for lm-eval; the records are passed in memory."""
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
        path: ``.jsonl``, one record per line; empty lines are skipped.
        limit: number of records to take: the first ones; for minimal pairs the first of every paradigm, then the
            second of every paradigm, and so on.

    Raises:
        CalibrationError: if the file cannot be read, a line is not a record, or a record lacks a key (naming both) or
            has a wrong value.
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
        raise CalibrationError(f"{path}: contains no records")
    return TaskFile(path.stem, form, tuple(_limited(records, limit)))


def _form_of(record: object, where: str) -> str:
    """The form that shares most keys with a record, so that a missing key is reported rather than an unknown form."""
    keys = record.keys() if isinstance(record, dict) else ()
    shared = {name: sum(key in keys for key in form.keys) / len(form.keys) for name, form in FORMS.items()}
    best = max(shared, key=shared.__getitem__)
    if not shared[best]:
        known = "; ".join(f"{name} {{{', '.join(form.keys)}}}" for name, form in FORMS.items())
        raise CalibrationError(f"{where} is not a known kind of record: {known}")
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
